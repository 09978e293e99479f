"""Making a JAM out of two parents: the maths (inits), the tables of keys, reading and writing, and `fuse`."""

from .fuse import fuse


__all__ = ["fuse"]
