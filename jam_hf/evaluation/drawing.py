"""Drawing captions with a JAM, and what share of the pictures is right.

It knows `generate` and a scorer; captions and expected pictures come from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from ..model.modeling_jam import JamForCausalLM
from ..model.processing_jam import JamProcessor


@dataclass(frozen=True)
class DrawingResult:
    """Shares of captions drawn right (see the scorer for `correct` and `exact`), and the pictures."""

    correct: float
    exact: float
    images: list[Image.Image]
    right: list[bool]


def draw(
    model: JamForCausalLM,
    processor: JamProcessor,
    captions: Sequence[str],
    guidance_scale: float | None = None,
    batch_size: int = 50,
    seed: int = 0,
    description: str = "drawing",
    **generation_kwargs: Any,
) -> list[Image.Image]:
    """One picture for each caption, by `generate(generation_mode="image")`; greedy unless `do_sample=True` is
    passed.
    """
    model.eval()
    torch.manual_seed(seed)
    images: list[Image.Image] = []
    for start in tqdm(range(0, len(captions), batch_size), desc=description, unit="batch", leave=False):
        batch = list(captions[start : start + batch_size])
        inputs = processor(text=batch, padding=True, return_tensors="pt").to(model.device)
        output = model.generate(
            **inputs,
            generation_mode="image",
            guidance_scale=guidance_scale,
            **{"do_sample": False, **generation_kwargs},
        )
        prompt_length = inputs["input_ids"].shape[1]
        for segments in processor.post_process_interleaved(output, model, prompt_length=prompt_length):
            images.append(next(s["image"] for s in segments if s["type"] == "image"))
    return images


def drawing_accuracy(
    model: JamForCausalLM,
    processor: JamProcessor,
    captions: Sequence[str],
    expected: Sequence[Any],
    score: Callable[[Image.Image, Any], Any],
    **kwargs: Any,
) -> DrawingResult:
    """Draw `captions` and score each picture against `expected`; `score(image, expected)` has `.correct` and
    `.exact`.
    """
    if len(captions) != len(expected) or not captions:
        raise ValueError(
            f"drawing_accuracy: {len(captions)} captions and {len(expected)} expected pictures; need as many."
        )
    images = draw(model, processor, captions, **kwargs)
    scores = [score(image, picture) for image, picture in zip(images, expected)]
    right = [bool(s.correct) for s in scores]
    return DrawingResult(sum(right) / len(right), sum(s.exact for s in scores) / len(scores), images, right)
