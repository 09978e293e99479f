"""Captions in varied English that determine the picture: every shape, colour, size, cell and the background.

It knows words for pictures of one to four objects; it draws nothing.
"""

from __future__ import annotations

import numpy as np

from .world import Picture, PictureObject


CELL_NAMES = {
    (0, 0): ("top left", "upper left"),
    (0, 1): ("top middle", "upper middle"),
    (0, 2): ("top right", "upper right"),
    (1, 0): ("middle left", "centre left"),
    (1, 1): ("centre", "middle"),
    (1, 2): ("middle right", "centre right"),
    (2, 0): ("bottom left", "lower left"),
    (2, 1): ("bottom middle", "lower middle"),
    (2, 2): ("bottom right", "lower right"),
}
SIZE_NAMES = {"small": ("small", "little"), "large": ("large", "big")}
_BACKGROUNDS = ("on a {0} background", "on {0}", "against a {0} backdrop")
_PICTURES = ("a picture of", "an image of", "")


def _pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[rng.integers(len(choices))]


def cell_name(rng: np.random.Generator, cell: tuple[int, int]) -> str:
    return _pick(rng, CELL_NAMES[cell])


def object_name(rng: np.random.Generator, o: PictureObject) -> str:
    """E.g. small red circle."""
    return f"{_pick(rng, SIZE_NAMES[o.size])} {o.colour} {o.shape}"


def placed_object(rng: np.random.Generator, o: PictureObject) -> str:
    """E.g. a small red circle in the top left. The place comes last: it is what binds the words before it to a cell."""
    return f"a {object_name(rng, o)} {_pick(rng, ('in the', 'at the'))} {cell_name(rng, o.cell)}"


def join(parts: list[str]) -> str:
    """x; x and y; x, y and z."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def caption(rng: np.random.Generator, picture: Picture) -> str:
    """One of many captions of a picture; together with the world's rules it determines the picture."""
    if not picture.objects:
        raise ValueError("caption: the picture has no objects; expected at least one.")
    order = rng.permutation(len(picture.objects))
    things = join([placed_object(rng, picture.objects[i]) for i in order])
    background = _pick(rng, _BACKGROUNDS).format(picture.background)
    if rng.integers(3) == 0:
        return f"{background}, {things}"
    opening = _pick(rng, _PICTURES)
    return f"{opening} {things} {background}".strip()
