"""Making a JAM out of two parents: the maths (inits), the tables of keys, the plan of a fusion, its run, and `fuse`."""

from importlib import import_module
from typing import Any


__all__ = ["fuse"]


def __getattr__(name: str) -> Any:
    """`fuse` when it is asked for: a module that may be called as the function of its name."""
    if name in __all__:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
