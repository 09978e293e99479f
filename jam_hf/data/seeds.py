"""What a seed may be: a number that numpy and torch both take. It draws nothing."""

from __future__ import annotations

from numbers import Integral


def check_seed(seed: int, role: str) -> None:
    """Raise a `ValueError` unless it is a whole number in 0..2^32 - 1; role: who was given it."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**32:
        raise ValueError(f"{role}: seed must be a whole number in 0..{2**32 - 1}, got {seed!r}.")


__all__ = ["check_seed"]
