"""The package `tests` of transformers: its own modules, unchanged, beside stand-ins for those the distribution lacks.

The environment variable `TRANSFORMERS_TESTS` says where its own are, also in the processes that the tests start.
"""

import os


__path__.append(os.environ["TRANSFORMERS_TESTS"])
