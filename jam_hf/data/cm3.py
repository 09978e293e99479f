"""The CM3 objective: a document as it is, or with masked spans moved to its end (arXiv 2309.15564, 2309.02591).

Pure functions on one document of token ids and an explicit random generator; nothing here knows a model, a tokenizer or
a batch. `unmask` is the exact inverse of `apply_spans`.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class CM3Settings:
    """Ids and probabilities of the objective.

    mask_token_id, num_mask_tokens: sentinels `mask_token_id + i` (paper [M]: 512). mask_end_token_id: end of a span.
    boundary_token_ids: `<break>`, a closing token of its own, bos, eos: no span holds one, so none crosses from one
        segment into another [C].
    mean_spans: mean of the Poisson that says how many spans are masked [M]: 1, so that e^-1 = 37 % stay causal.
    whole_segment_probability: instead of random spans, mask exactly one whole segment, all of a text or all of an image
        [M]; this trains the unconditional branch of guidance. The value is our reconstruction.
    text_segments_only: whether those whole segments are only texts. image_token_range: `[first, last)` of image codes.
    picture_structure_token_ids: what a picture's layout has beside the codes; it is part of the image's segment.
    keep_first_token: whether the first token of a document, its bos [M], is never masked. Not so for a tokenizer
        without bos: it is text there, and guidance's branch begins with `<mask>`.
    """

    mask_token_id: int
    num_mask_tokens: int
    mask_end_token_id: int
    boundary_token_ids: tuple[int, ...]
    mean_spans: float = 1.0
    whole_segment_probability: float = 0.1
    text_segments_only: bool = False
    image_token_range: tuple[int, int] = (0, 0)
    picture_structure_token_ids: tuple[int, ...] = ()
    keep_first_token: bool = True

    def __post_init__(self) -> None:
        if self.num_mask_tokens < 1:
            raise ValueError(f"CM3Settings: num_mask_tokens must be at least 1, got {self.num_mask_tokens}.")
        if self.mean_spans < 0:
            raise ValueError(f"CM3Settings: mean_spans must not be negative, got {self.mean_spans}.")
        if not 0 <= self.whole_segment_probability <= 1:
            raise ValueError(
                f"CM3Settings: whole_segment_probability must be in 0..1, got {self.whole_segment_probability}."
            )
        if self.text_segments_only and self.image_token_range[0] >= self.image_token_range[1]:
            raise ValueError(
                "CM3Settings: text_segments_only needs image_token_range, to know which segments are images; got "
                f"{self.image_token_range}."
            )

    @classmethod
    def from_config(cls, config: Any, **settings: Any) -> CM3Settings:
        """Settings with the ids of a `JamConfig`."""
        boundaries = (config.break_token_id, config.image_end_token_id, config.bos_token_id, *config.eos_token_ids)
        return cls(
            mask_token_id=config.mask_token_id,
            num_mask_tokens=config.num_mask_tokens,
            mask_end_token_id=config.mask_end_token_id,
            boundary_token_ids=tuple(i for i in boundaries if i is not None),
            image_token_range=(config.image_token_range.start, config.image_token_range.stop),
            picture_structure_token_ids=config.picture_structure_token_ids,
            keep_first_token=config.bos_token_id is not None,
            **settings,
        )


def segments(ids: np.ndarray, settings: CM3Settings) -> list[tuple[int, int]]:
    """Maximal runs `[start, end)` without a boundary token, in order; see `keep_first_token` for the first token."""
    boundary: np.ndarray = np.zeros(len(ids), dtype=bool)
    boundary[0] = settings.keep_first_token
    for token in settings.boundary_token_ids:  # a few comparisons: several times faster than np.isin on one document
        boundary |= ids == token
    edges = [*([] if boundary[0] else [-1]), *np.flatnonzero(boundary).tolist(), len(ids)]
    return [(a + 1, b) for a, b in zip(edges, edges[1:]) if a + 1 < b]


def draw_spans(ids: np.ndarray, settings: CM3Settings, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Disjoint spans `[start, end)` to mask, in order; empty for a document that stays causal.

    With `whole_segment_probability`, one segment drawn uniformly. Otherwise Poisson(`mean_spans`) spans [M], clamped to
    the
    sentinels: two points drawn uniformly behind the first token make a span [R], which is clipped to the segment of the
    first point drawn; a span that would be empty or touch an earlier one is not masked [R].
    """
    whole = rng.random() < settings.whole_segment_probability
    count = 0 if whole else min(int(rng.poisson(settings.mean_spans)), settings.num_mask_tokens)
    if not whole and count == 0:
        return []
    found = segments(ids, settings)
    if not found:
        return []
    if whole:
        first, last = settings.image_token_range
        if settings.text_segments_only:
            structure = settings.picture_structure_token_ids
            found = [(a, b) for a, b in found if not first <= ids[a] < last and ids[a] not in structure]
        return [found[rng.integers(len(found))]] if found else []
    starts = [a for a, _ in found]
    spans: list[tuple[int, int]] = []
    for anchor, other in rng.integers(int(settings.keep_first_token), len(ids), size=(count, 2)).tolist():
        index = bisect_right(starts, anchor) - 1
        if index < 0 or anchor >= found[index][1]:
            continue  # a boundary token
        low, high = found[index]
        start, end = max(min(anchor, other), low), min(max(anchor, other) + 1, high)
        if start < end and all(end < a or b < start for a, b in spans):
            spans.append((start, end))
    return sorted(spans)


def apply_spans(
    ids: np.ndarray, spans: list[tuple[int, int]], settings: CM3Settings, max_length: int | None = None
) -> np.ndarray:
    """Leave sentinel i in place of span i, and append `<sentinel_i> span <end of span>` in order.

    The infills come at the end of the whole block [M], so behind eos where the document ends in one: an eos says that
    the document is over, and nothing but infills follows it [R]. Where the result exceeds `max_length`, the end of the
    causal part is cut, not the infills [M]; a cut may remove a sentinel whose infill stays.

    Raises:
        ValueError: if the infills alone exceed `max_length`, or there are more spans than sentinels.
    """
    if len(spans) > settings.num_mask_tokens:
        raise ValueError(f"CM3: {len(spans)} spans for {settings.num_mask_tokens} sentinels.")
    if not spans:
        return ids[:max_length]
    causal, infills, position = [], [], 0
    for index, (start, end) in enumerate(spans):
        sentinel = [settings.mask_token_id + index]
        causal += [ids[position:start], sentinel]
        infills += [sentinel, ids[start:end], [settings.mask_end_token_id]]
        position = end
    causal.append(ids[position:])
    front = np.concatenate(causal)
    back = np.concatenate(infills)
    if max_length is not None and len(front) + len(back) > max_length:
        if len(back) >= max_length:
            raise ValueError(
                f"CM3: the masked spans need {len(back)} tokens, max_length is {max_length}. Raise max_length, or mask "
                "less."
            )
        front = front[: max_length - len(back)]
    return np.concatenate((front, back))


def unmask(ids: np.ndarray, settings: CM3Settings) -> np.ndarray:
    """Put the infills of `apply_spans` back in place of their sentinels: the exact inverse (without a cut).

    Raises:
        ValueError: if an infill is not closed, or has no sentinel to go to.
    """
    first, last = settings.mask_token_id, settings.mask_token_id + settings.num_mask_tokens
    is_sentinel = (ids >= first) & (ids < last)
    positions = np.flatnonzero(is_sentinel)
    if len(positions) == 0:
        return ids
    if len(positions) % 2:
        raise ValueError(f"CM3: {len(positions)} sentinels; expected each twice, in place and before its infill.")
    half = len(positions) // 2
    front, back = ids[: positions[half]], ids[positions[half] :]
    pieces, position = [], 0
    openings = [*(positions[half:] - positions[half]), len(back)]
    for index in range(half):
        where = int(positions[index])
        start, end = openings[index], openings[index + 1]
        if ids[where] != back[start] or back[end - 1] != settings.mask_end_token_id:
            raise ValueError(
                f"CM3: infill {index} does not begin with its sentinel or does not end with the end of span."
            )
        pieces += [front[position:where], back[start + 1 : end - 1]]
        position = where + 1
    return np.concatenate([*pieces, front[position:]])


def cm3(ids: np.ndarray, settings: CM3Settings, rng: np.random.Generator, max_length: int | None = None) -> np.ndarray:
    """A document, masked or as it is: `draw_spans`, then `apply_spans` (loss: -log p of every token [P]).

    An infill is never cut [M], so a span whose infill leaves no room for the document is not masked, the longest first
    [R].

    Raises:
        ValueError: if the document has a sentinel or an end of span already: masked again, it could not be read back.
    """
    ids = np.asarray(ids)
    if settings.mean_spans or settings.whole_segment_probability:
        last = settings.mask_token_id + settings.num_mask_tokens
        marks = ((ids >= settings.mask_token_id) & (ids < last)) | (ids == settings.mask_end_token_id)
        if marks.any():
            raise ValueError(
                f"CM3: the document has the sentinel or end of span {int(ids[marks.argmax()])} at position "
                f"{int(marks.argmax())} already. Take it out, or train on this document without CM3."
            )
    spans = draw_spans(ids, settings, rng)
    if max_length is not None:
        while spans and sum(end - start + 2 for start, end in spans) >= max_length:
            spans.remove(max(spans, key=lambda span: span[1] - span[0]))
    return apply_spans(ids, spans, settings, max_length)
