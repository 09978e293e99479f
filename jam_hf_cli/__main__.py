"""`python -m jam_hf_cli` is `jam-hf`."""

import sys

from . import entry


if __name__ == "__main__":
    sys.exit(entry())
