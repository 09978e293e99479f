"""How-to dialogues: somebody asks for a picture, and the answer builds it in steps, each with a text and a picture.

It knows the chat format of transformers (messages with text and image content), not tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .captions import cell_name, join, object_name, steps
from .world import Picture, sample_picture


_REQUESTS = (
    "How do I draw {things} {background}?",
    "Show me how to build a picture with {things} {background}.",
    "Please draw {things} {background}, step by step.",
)


def _choice(rng: np.random.Generator, values: tuple[str, ...]) -> str:
    return values[rng.integers(len(values))]


def howto(rng: np.random.Generator, num_steps: int) -> tuple[list[dict[str, Any]], list[Picture]]:
    """A dialogue whose answer has `num_steps` (2..4) steps.

    Returns:
        messages in the chat format, with an image entry after each step's text, and the pictures of those entries: each
        shows everything built so far.
    """
    if not 2 <= num_steps <= 4:
        raise ValueError(f"howto: num_steps must be 2, 3 or 4, got {num_steps}.")
    final = sample_picture(rng, num_steps)
    objects = [final.objects[i] for i in rng.permutation(num_steps)]
    background = f"on a {final.background} background"
    names = [
        (object_name(rng, o), cell_name(rng, o.cell)) for o in objects
    ]  # the answer keeps to the words of the request
    things = join([f"a {name} in the {cell}" for name, cell in names])
    request = _choice(rng, _REQUESTS).format(things=things, background=background)
    content: list[dict[str, str]] = []
    pictures: list[Picture] = []
    for number, text in enumerate(steps(rng, names, final.background), 1):
        content += [{"type": "text", "text": text}, {"type": "image"}]
        pictures.append(Picture(tuple(objects[:number]), final.background))
    messages = [
        {"role": "user", "content": [{"type": "text", "text": request}]},
        {"role": "assistant", "content": content},
    ]
    return messages, pictures
