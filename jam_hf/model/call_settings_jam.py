"""The settings of a call of `generate()` that a JAM has beside transformers' own: each is a field here, checked here,
and what it means is made here.

It knows names and values; what they do is in grammar_jam.py and guidance_jam.py, and when in generation_jam.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .grammar_jam import DocumentRules, as_ids
from .guidance_jam import GuidanceSettings


@dataclass(frozen=True, kw_only=True)
class JamCallSettings:
    """What a call asks for. Each field may be an argument of `generate()`, stand in the generation config that is
    passed with it, or in the model's own (generation_config.json), in this order; `None` where nobody said it.

    Args:
        generation_mode: "interleaved", "text" or "image" (one picture, at once). `None`: plain next-token generation
            without a grammar.
        min_new_images, max_new_images: pictures to finish in "interleaved" mode, one that is half-drawn in the prompt
            included.
        image_after_token_ids: a picture follows each of these ids of written text, and stands nowhere else
            (`processor.sentence_end_token_ids()` for one after each sentence).
        image_positions: pictures stand after so many ids of written text, and nowhere else.
        guidance_scale: classifier-free guidance inside pictures [P]; 1.0 or `None`: none.
        image_guidance_scale: a scale of its own for the pictures of the context, beside `guidance_scale` for the whole.
        contrastive_alpha, contrastive_k: CD-K [C] instead of guidance.
        image_temperature, image_top_k, image_top_p, image_min_p: for codes, where they differ from `temperature` and so
            on, which hold for both where these are `None`.
        image_repetition_penalty, image_no_repeat_ngram_size: over the codes of the document. Without `image_`, these
            and all that look back at what was written (history_jam.py) go by text alone.
        negative_prompt_ids: rows without padding, one for all or one for each prompt, of what guidance turns away from,
            in place of `<mask>`; an argument alone: int64 `[B or 1, T]`, padding told by
            `negative_prompt_attention_mask`.
        asked: names of the settings that the call has said itself, by arguments or in the config that came with it.
    Raises:
        ValueError: on values that are out of range or contradict each other.
    """

    generation_mode: str | None = None
    min_new_images: int | None = None
    max_new_images: int | None = None
    image_after_token_ids: Sequence[int] | None = None
    image_positions: Sequence[int] | None = None
    guidance_scale: float | None = None
    image_guidance_scale: float | None = None
    contrastive_alpha: float | None = None
    contrastive_k: int | None = None
    image_temperature: float | None = None
    image_top_k: int | None = None
    image_top_p: float | None = None
    image_min_p: float | None = None
    image_repetition_penalty: float | None = None
    image_no_repeat_ngram_size: int | None = None
    negative_prompt_ids: list[list[int]] | None = None
    asked: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self.rules()
        if self.negative_prompt_ids is not None and not self._guidance().branches:
            raise ValueError(
                "negative_prompt_ids have nothing to act on: set guidance_scale, or contrastive_alpha, contrastive_k."
            )
        self.guidance()
        self.image_history()

    @staticmethod
    def said(arguments: dict[str, Any], passed: Any, own: Any) -> dict[str, Any]:
        """Fields by name, unchecked: of the `arguments` of a call, out of which they are taken, of the generation
        config `passed` with it (or `None`) and of the model's `own`.

        What the model's own config says of one kind of call is no contradiction to a call of another kind: a saved
        layout of pictures is for interleaved documents, and of guidance the kind that is passed holds. What `passed`
        has in common with the model's own is the model's (pipelines pass a copy).
        """
        given = {name: arguments.pop(name) for name in CALL_SETTINGS if name in arguments}
        values = {name: setting(name, given, passed, own) for name in CALL_SETTINGS}
        said = {name: getattr(passed, name, None) for name in CALL_SETTINGS}
        said = {name: value for name, value in said.items() if value != getattr(own, name, None)} | given
        asked = frozenset(name for name, value in said.items() if value is not None)
        if values["generation_mode"] != "interleaved" and ("generation_mode" in given or "generation_mode" in asked):
            values |= dict.fromkeys(set(LAYOUT_SETTINGS) - asked)
        for this, other in ((SCALES, CONTRASTIVE), (CONTRASTIVE, SCALES)):
            if asked.intersection(this):
                values |= dict.fromkeys(set(other) - asked)
        return values | {"asked": asked}

    def rules(self) -> DocumentRules | None:
        """How documents are laid out; None without a grammar."""
        layout = {name: getattr(self, name) for name in LAYOUT_SETTINGS}
        if self.generation_mode is None:
            if any(value is not None for value in layout.values()):
                raise ValueError(f"{', '.join(layout)} need generation_mode='interleaved'.")
            return None
        for name in ("image_after_token_ids", "image_positions"):
            ids = layout[name]
            whole = isinstance(ids, (list, tuple)) and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
            if ids is not None and not whole:
                raise ValueError(f"{name} must be a list of whole numbers, got {ids!r}.")
        least = 0 if self.min_new_images is None else self.min_new_images
        after, places = tuple(self.image_after_token_ids or ()), tuple(self.image_positions or ())
        return DocumentRules(self.generation_mode, least, self.max_new_images, after, places)

    def _guidance(self) -> GuidanceSettings:
        return GuidanceSettings(*(getattr(self, name) for name in GUIDANCE_SETTINGS))

    def guidance(self) -> GuidanceSettings | None:
        """How pictures are guided; None where the call has nothing to guide."""
        guidance = self._guidance()
        return guidance if guidance.branches and self.generation_mode != "text" else None

    def image_history(self) -> list[LogitsProcessor]:
        """What looks back at the codes of a document; without it codes may repeat as they like."""
        found = (
            _stock("image_repetition_penalty", self.image_repetition_penalty, 1, RepetitionPenaltyLogitsProcessor),
            _stock("image_no_repeat_ngram_size", self.image_no_repeat_ngram_size, 0, NoRepeatNGramLogitsProcessor),
        )
        return [processor for processor in found if processor is not None]

    def image_warpers(self, num_beams: int = 1) -> dict[type[LogitsProcessor], tuple[bool, LogitsProcessor | None]]:
        """For transformers' warpers, in the order in which it applies them: whether codes have a setting of their own,
        and what warps them then (None: nothing does). They are read where a call samples."""
        keep = {} if num_beams == 1 else {"min_tokens_to_keep": 2}
        made = (
            (self.image_temperature, _stock("image_temperature", self.image_temperature, 1, TemperatureLogitsWarper)),
            (self.image_top_k, _stock("image_top_k", self.image_top_k, 0, TopKLogitsWarper, **keep)),
            (self.image_top_p, _stock("image_top_p", self.image_top_p, 1, TopPLogitsWarper, **keep)),
            (self.image_min_p, _stock("image_min_p", self.image_min_p, 0, MinPLogitsWarper, **keep)),
        )
        return {stock: (value is not None, warper) for stock, (value, warper) in zip(WARPER_CLASSES, made)}


# All that a generation config may say, and in groups.
CALL_SETTINGS = tuple(f.name for f in fields(JamCallSettings) if f.name not in ("negative_prompt_ids", "asked"))
LAYOUT_SETTINGS = ("min_new_images", "max_new_images", "image_after_token_ids", "image_positions")
SCALES, CONTRASTIVE = ("guidance_scale", "image_guidance_scale"), ("contrastive_alpha", "contrastive_k")
GUIDANCE_SETTINGS = (*SCALES, *CONTRASTIVE)
MODALITY_SETTINGS = tuple(name for name in CALL_SETTINGS[1:] if name not in (*LAYOUT_SETTINGS, *GUIDANCE_SETTINGS))
WARPER_CLASSES = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)


def setting(name: str, arguments: Mapping[str, Any], passed: Any, own: Any) -> Any:
    """A setting of a call, transformers' too: from its arguments, the config that came with it, or the model's own."""
    if name in arguments:
        return arguments[name]
    value = getattr(passed, name, None)
    return getattr(own, name, None) if value is None else value


def _stock(name: str, value: Any, idle: float, stock: type[LogitsProcessor], **kwargs: Any) -> LogitsProcessor | None:
    """transformers' own processor of this value; None where it is `None`, or changes nothing."""
    if value is None or value == idle:
        return None
    try:
        return stock(value, **kwargs)
    except ValueError as error:
        raise ValueError(f"{name}={value!r}: {error}") from error


def end_ids(eos_token_id: Any) -> list[int]:
    """What ends a document, as settings have it: one id, several, None, or -1 for none (continuous batching)."""
    if eos_token_id is None:
        return []
    ids = torch.as_tensor(eos_token_id).reshape(-1).tolist()
    return [int(i) for i in ids if i >= 0]


def negative_prompts(ids: Any, mask: Any, image_token_id: int) -> list[list[int]] | None:
    """Rows of the negative prompt, int64 `[B or 1, T]`, as lists without padding.

    Raises:
        ValueError: if they are no such ids, are blank, or have placeholders of pictures.
    """
    if ids is None:
        if mask is not None:
            raise ValueError("negative_prompt_attention_mask came without negative_prompt_ids: pass both, or neither.")
        return None
    ids = as_ids(torch.as_tensor(ids), "negative_prompt_ids")
    mask = torch.ones_like(ids) if mask is None else torch.as_tensor(mask)
    if ids.ndim != 2 or mask.shape != ids.shape or not bool(mask.any(1).all()):
        raise ValueError(
            "negative_prompt_ids must be ids [B or 1, T] with at least one token in each row, and "
            f"negative_prompt_attention_mask of the same shape; got {list(ids.shape)} and {list(mask.shape)}."
        )
    if bool((ids == image_token_id).any()):
        raise ValueError("negative_prompt_ids hold placeholders <image>; put the codes of the pictures in their place.")
    return [[token for token, kept in zip(*pair) if kept] for pair in zip(ids.tolist(), mask.tolist())]


__all__ = [
    "CALL_SETTINGS",
    "GUIDANCE_SETTINGS",
    "LAYOUT_SETTINGS",
    "MODALITY_SETTINGS",
    "WARPER_CLASSES",
    "JamCallSettings",
    "end_ids",
    "negative_prompts",
    "setting",
]
