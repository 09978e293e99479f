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
_FIRST_STEPS = (
    "Start {background} and put a {object} in the {cell}.",
    "Begin {background}: draw a {object} in the {cell}.",
)
_NEXT_STEPS = (
    "Then add a {object} in the {cell}.",
    "Now draw a {object} in the {cell}.",
    "Next, put a {object} in the {cell}.",
)


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


def steps(rng: np.random.Generator, names: list[tuple[str, str]], background: str) -> list[str]:
    """How to build a picture, one sentence for each object; `names` are (object, cell) in words, in the order of the
    steps.

    E.g. Step 1. Start on a white background and put a small red circle in the top left.
    """
    texts = []
    for number, (name, cell) in enumerate(names, 1):
        text = _pick(rng, _FIRST_STEPS if number == 1 else _NEXT_STEPS)
        texts.append(
            f"Step {number}. " + text.format(background=f"on a {background} background", object=name, cell=cell)
        )
    return texts


def caption(rng: np.random.Generator, picture: Picture) -> str:
    """One of many captions of a picture; together with the world's rules it determines the picture.

    One in four tells the steps in which the picture is built, as how-tos do.
    """
    if not picture.objects:
        raise ValueError("caption: the picture has no objects; expected at least one.")
    objects = [picture.objects[i] for i in rng.permutation(len(picture.objects))]
    if rng.integers(4) == 0:
        return " ".join(
            steps(rng, [(object_name(rng, o), cell_name(rng, o.cell)) for o in objects], picture.background)
        )
    things = join([placed_object(rng, o) for o in objects])
    background = _pick(rng, _BACKGROUNDS).format(picture.background)
    if rng.integers(3) == 0:
        return f"{background}, {things}"
    opening = _pick(rng, _PICTURES)
    return f"{opening} {things} {background}".strip()
