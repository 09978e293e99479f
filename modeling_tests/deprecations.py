"""A pytest plugin: what a library deprecates by its logger, as transformers does, is raised where it is said."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterable

import pytest


LIBRARIES = ("transformers", "diffusers", "peft", "trl", "accelerate", "huggingface_hub")
DEPRECATED = re.compile("deprecat|will be removed", re.IGNORECASE)
BOTH = "Passing `generation_config` together with generation-related arguments"


class Deprecation(DeprecationWarning):
    """A message that says something is deprecated."""


def is_owed(message: str, files: Iterable[str]) -> bool:
    """Whether a deprecation is not for this package to mend. `files`: of the calls that led to it, the innermost first.

    `generate()` with a config and arguments of one call still goes by both, and tests hold which goes first; the
    package itself says one of the two. transformers 5.23 says both to a draft model, in its own candidate generators.
    """
    if not message.startswith(BOTH):
        return False
    for file in files:
        if file.endswith("generation/candidate_generator.py"):
            return True
        if "/jam_hf/" in file and not file.endswith("generation_jam.py"):
            return False
    return True


def calling_files() -> Iterable[str]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_code.co_filename
        frame = frame.f_back


class RaisesDeprecations(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if DEPRECATED.search(message) and not is_owed(message, calling_files()):
            raise Deprecation(message)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """transformers speaks from WARNING on; only errors are shown."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_warning()
    for handler in logging.getLogger("transformers").handlers:
        handler.setLevel(logging.ERROR)
    for library in LIBRARIES:
        logging.getLogger(library).addHandler(RaisesDeprecations(logging.WARNING))
