"""Reading a picture back: which objects it shows, so that drawing can be measured without a person.

It compares each cell with what every object would look like there, on the background that the whole picture suggests.
It knows pixels and the world's rules, not where the picture came from.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from .world import BACKGROUNDS, CELL, COLOURS, GRID, IMAGE_SIZE, SHAPES, SIZES, Picture, PictureObject, render


# Mean squared error per cell, of pixels in 0..1, above which a cell shows nothing that belongs to the world. Noise, a
# wrong colour or half an object lie far above it, a VQ's blur far below.
MAX_ERROR = 0.01


@dataclass(frozen=True)
class Reading:
    """What was read. `picture` is None where some cell shows nothing of this world; `errors` is `[3, 3]`, see
    MAX_ERROR.
    """

    picture: Picture | None
    errors: np.ndarray


@dataclass(frozen=True)
class PictureScore:
    """correct: every shape, colour and cell right, and nothing else there. exact: sizes and background as well."""

    correct: bool
    exact: bool
    reading: Reading


@functools.cache
def _templates(background: str) -> tuple[list[tuple[str, str, str] | None], np.ndarray]:
    """What a cell can show on a background: labels, and pixels `[templates, CELL * CELL * 3]` in 0..1."""
    labels: list[tuple[str, str, str] | None] = [None]
    pictures = [Picture((), background)]
    for shape in SHAPES:
        for colour in COLOURS:
            for size in SIZES:
                labels.append((shape, colour, size))
                pictures.append(Picture((PictureObject((0, 0), shape, colour, size),), background))
    pixels = [np.asarray(render(p), np.float32)[:CELL, :CELL].reshape(-1) / 255 for p in pictures]
    return labels, np.stack(pixels)


def read_picture(image: Image.Image) -> Reading:
    """Read a PIL picture of any size: the background that explains it best, then the best object of each cell."""
    if not isinstance(image, Image.Image):
        raise ValueError(f"read_picture: expected a PIL picture, got {type(image).__name__}.")
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    pixels = np.asarray(image.convert("RGB"), np.float32) / 255
    cells = pixels.reshape(GRID, CELL, GRID, CELL, 3).transpose(0, 2, 1, 3, 4).reshape(GRID * GRID, -1)
    best: Any = None
    for background in BACKGROUNDS:
        labels, templates = _templates(background)
        distances = ((cells[:, None] - templates[None]) ** 2).mean(-1)
        choice = distances.argmin(1)
        errors = distances.min(1)
        if best is None or errors.sum() < best[1].sum():
            best = ([labels[i] for i in choice], errors, background)
    chosen, errors, background = best
    picture = None
    if errors.max() <= MAX_ERROR:
        objects = [PictureObject((i // GRID, i % GRID), *label) for i, label in enumerate(chosen) if label is not None]
        picture = Picture(tuple(objects), background)
    return Reading(picture, errors.reshape(GRID, GRID))


def score_picture(image: Image.Image, expected: Picture) -> PictureScore:
    """Compare what `image` shows with what it should show."""
    reading = read_picture(image)
    shown = reading.picture
    if shown is None:
        return PictureScore(False, False, reading)
    correct = [o.key for o in shown.objects] == [o.key for o in expected.objects]
    return PictureScore(correct, shown == expected, reading)
