"""Picture world: pictures of a few objects on a 3x3 grid, their rendering, and which of them are held out from
training.

It knows pictures, not words (captions.py) and not models. Everything is seeded; nothing is downloaded.
"""

from __future__ import annotations

import functools
import itertools
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw


SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (214, 40, 40),
    "green": (42, 157, 60),
    "blue": (38, 84, 214),
    "yellow": (250, 204, 21),
    "purple": (142, 58, 190),
}
SIZES = ("small", "large")
BACKGROUNDS = {"white": (250, 250, 250), "black": (20, 20, 24)}
GRID = 3
CELL = 16  # pixels of one cell, which is 2x2 codes of 8x8 pixels
IMAGE_SIZE = GRID * CELL
_RADIUS = {"small": 5.4, "large": 7.6}  # in pixels
_SUPERSAMPLE = 4


@dataclass(frozen=True, order=True)
class PictureObject:
    """One object: `cell` is (row, column), counted from the top left."""

    cell: tuple[int, int]
    shape: str
    colour: str
    size: str

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("shape", self.shape, SHAPES),
            ("colour", self.colour, tuple(COLOURS)),
            ("size", self.size, SIZES),
        ):
            if value not in choices:
                raise ValueError(f"PictureObject: {name} must be one of {', '.join(choices)}, got {value!r}.")
        if len(self.cell) != 2 or not all(0 <= i < GRID for i in self.cell):
            raise ValueError(f"PictureObject: cell must be (row, column) in 0..{GRID - 1}, got {self.cell!r}.")

    @property
    def key(self) -> tuple[int, int, int]:
        """(shape, colour, cell) as indices: what the held-out rule speaks of, whatever the size."""
        return SHAPES.index(self.shape), tuple(COLOURS).index(self.colour), self.cell[0] * GRID + self.cell[1]


@dataclass(frozen=True)
class Picture:
    """Objects, at most one to a cell, kept in reading order, on a background."""

    objects: tuple[PictureObject, ...]
    background: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "objects", tuple(sorted(self.objects)))
        if self.background not in BACKGROUNDS:
            raise ValueError(f"Picture: background must be one of {', '.join(BACKGROUNDS)}, got {self.background!r}.")
        cells = [o.cell for o in self.objects]
        if len(set(cells)) != len(cells):
            raise ValueError(f"Picture: at most one object to a cell, got {sorted(cells)}.")

    def to_json(self) -> str:
        objects = [[*o.cell, o.shape, o.colour, o.size] for o in self.objects]
        return json.dumps({"background": self.background, "objects": objects})

    @classmethod
    def from_json(cls, text: str) -> Picture:
        values = json.loads(text)
        objects = tuple(PictureObject((r, c), s, colour, size) for r, c, s, colour, size in values["objects"])
        return cls(objects, values["background"])


# ----- rendering ------------------------------------------------------------------------------------------------------


@functools.cache
def _mask(shape: str, size: str, cell: int) -> np.ndarray:
    """Coverage of one cell by a shape, float `[cell, cell]` in 0..1."""
    n = cell * _SUPERSAMPLE
    centre, radius = n / 2, _RADIUS[size] * n / CELL
    image = Image.new("L", (n, n), 0)
    draw = ImageDraw.Draw(image)
    low, high = centre - radius, centre + radius - 1
    if shape == "circle":
        draw.ellipse((low, low, high, high), fill=255)
    elif shape == "square":
        side = 0.86 * radius
        draw.rectangle((centre - side, centre - side, centre + side - 1, centre + side - 1), fill=255)
    elif shape == "triangle":
        draw.polygon([(centre, low), (high, high), (low, high)], fill=255)
    else:
        arm = radius * 0.29
        draw.rectangle((low, centre - arm, high, centre + arm - 1), fill=255)
        draw.rectangle((centre - arm, low, centre + arm - 1, high), fill=255)
    return np.asarray(image.resize((cell, cell), Image.Resampling.BOX), dtype=np.float32) / 255


def render(picture: Picture, image_size: int = IMAGE_SIZE) -> Image.Image:
    """The picture as RGB, `image_size` (a multiple of 3) pixels square."""
    if image_size < GRID or image_size % GRID:
        raise ValueError(f"render: image_size must be a positive multiple of {GRID}, got {image_size}.")
    cell = image_size // GRID
    pixels: np.ndarray = np.empty((image_size, image_size, 3), np.float32)
    pixels[:] = BACKGROUNDS[picture.background]
    for o in picture.objects:
        rows = slice(o.cell[0] * cell, (o.cell[0] + 1) * cell)
        columns = slice(o.cell[1] * cell, (o.cell[1] + 1) * cell)
        alpha = _mask(o.shape, o.size, cell)[..., None]
        pixels[rows, columns] = pixels[rows, columns] * (1 - alpha) + np.array(COLOURS[o.colour]) * alpha
    return Image.fromarray(pixels.round().astype(np.uint8))


# ----- held out from training -----------------------------------------------------------------------------------------


def is_held_out_object(key: tuple[int, int, int]) -> bool:
    """One fifth of the (shape, colour, cell) triples: no training picture shows that object there.

    A Latin pattern: every shape and colour is held out in some cells, and seen in most.
    """
    shape, colour, cell = key
    return (shape + 4 * colour + cell + cell // GRID) % 5 == 0


def is_held_out_pair(first: tuple[int, int, int], second: tuple[int, int, int]) -> bool:
    """One fifth of the pairs of triples: no training picture shows those two objects in those two places."""
    low, high = sorted((first, second), key=lambda k: k[2])
    value = (low[0] * 7 + low[1] * 11 + low[2] * 13) * 31 + high[0] * 17 + high[1] * 19 + high[2] * 23
    return (value * 2654435761 % 2**32) >> 16 < 2**16 // 5


def is_training_picture(picture: Picture) -> bool:
    """Whether a picture may be shown in training: no held-out object, no held-out pair."""
    keys = [o.key for o in picture.objects]
    if any(is_held_out_object(key) for key in keys):
        return False
    return not any(is_held_out_pair(a, b) for a, b in itertools.combinations(keys, 2))


# ----- sampling -------------------------------------------------------------------------------------------------------


def sample_object(rng: np.random.Generator, taken: tuple[tuple[int, int], ...] = ()) -> PictureObject:
    """A uniform object in a cell that is not taken."""
    free = [(r, c) for r in range(GRID) for c in range(GRID) if (r, c) not in taken]
    cell = free[rng.integers(len(free))]
    return PictureObject(
        cell,
        SHAPES[rng.integers(len(SHAPES))],
        tuple(COLOURS)[rng.integers(len(COLOURS))],
        SIZES[rng.integers(len(SIZES))],
    )


def sample_picture(rng: np.random.Generator, num_objects: int, held_out: str | None = None) -> Picture:
    """A uniform picture of `num_objects` (1..9) objects.

    Args:
        held_out: `None`: one that training may show. "object": one object, held out. "pair": two objects that training
            shows each, but never together.
    """
    if not 1 <= num_objects <= GRID**2:
        raise ValueError(f"sample_picture: num_objects must be 1..{GRID**2}, got {num_objects}.")
    needed = {None: num_objects, "object": 1, "pair": 2}
    if held_out not in needed or needed[held_out] != num_objects:
        raise ValueError(
            f"sample_picture: held_out must be None, 'object' (with 1 object) or 'pair' (with 2), got {held_out!r} "
            f"with {num_objects}."
        )
    background = tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    while held_out is not None:
        picture = Picture(_sample_objects(rng, num_objects), background)
        keys = [o.key for o in picture.objects]
        if held_out == "object" and is_held_out_object(keys[0]):
            return picture
        if held_out == "pair" and not any(map(is_held_out_object, keys)) and is_held_out_pair(*keys):
            return picture
    return Picture(_sample_objects(rng, num_objects, background), background)


def _sample_objects(
    rng: np.random.Generator, num_objects: int, background: str | None = None
) -> tuple[PictureObject, ...]:
    """Objects in different cells; with a background, only such as training may show together."""
    objects: tuple[PictureObject, ...] = ()
    tries = 0
    while len(objects) < num_objects:
        more = (*objects, sample_object(rng, tuple(o.cell for o in objects)))
        if background is None or is_training_picture(Picture(more, background)):
            objects = more
        tries += 1
        if tries > 50 * num_objects:  # a corner with nothing left to add: begin again
            objects, tries = (), 0
    return objects


def all_objects() -> list[PictureObject]:
    """Every object there is, in a fixed order."""
    cells: list[Any] = list(itertools.product(range(GRID), range(GRID)))
    return [PictureObject(cell, *rest) for cell in cells for rest in itertools.product(SHAPES, COLOURS, SIZES)]
