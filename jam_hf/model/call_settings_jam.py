"""Which settings a call of `generate()` has: its own, those of the config that came with it, and the model's.

It knows names and values; what they do is in grammar_jam.py and guidance_jam.py, and when in generation_jam.py.
"""

from __future__ import annotations

from typing import Any

import torch

from .grammar_jam import DocumentRules
from .guidance_jam import GuidanceSettings
from .history_jam import IMAGE_HISTORY


SCALES, CONTRASTIVE = ("guidance_scale", "image_guidance_scale"), ("contrastive_alpha", "contrastive_k")
GUIDANCE_SETTINGS = (*SCALES, *CONTRASTIVE)
LAYOUT_SETTINGS = ("min_new_images", "max_new_images", "image_after_token_ids", "image_positions")
MODALITY_SETTINGS = ("image_temperature", "image_top_k", "image_top_p", "image_min_p", *IMAGE_HISTORY)
# All that is decided here, and what of it transformers' generation config does not know.
CALL_SETTINGS = ("generation_mode", *GUIDANCE_SETTINGS, *MODALITY_SETTINGS, *LAYOUT_SETTINGS)
JAM_SETTINGS = tuple(name for name in CALL_SETTINGS if name != "guidance_scale")


def settle(config: Any, arguments: dict[str, Any], passed_config: Any, own_config: Any) -> None:
    """Put the settings of a call into its complete `config`, as attributes: all of `JAM_SETTINGS`, and `passed_settings`, the
    names of those that the call has said itself.

    What the model's own config says of one kind of call is no contradiction to a call of another kind: a saved layout of
    pictures is for interleaved documents, and of guidance the kind that is passed holds.

    Args:
        config: transformers' merger of all, which knows every setting but those of `arguments`.
        arguments: of the call. passed_config: the config that came with it, or `None`; what it has in common with the model's
            own is the model's (pipelines pass a copy).
    """
    said = {name: getattr(passed_config, name, None) for name in CALL_SETTINGS}
    said = {name: value for name, value in said.items() if value != getattr(own_config, name, None)}
    passed = {name for name in CALL_SETTINGS if (said | arguments).get(name) is not None}
    for name in JAM_SETTINGS:
        setattr(config, name, arguments.get(name, getattr(config, name, None)))
    if config.generation_mode != "interleaved" and ("generation_mode" in arguments or "generation_mode" in passed):
        for name in set(LAYOUT_SETTINGS) - passed:
            setattr(config, name, None)
    for asked, other in ((SCALES, CONTRASTIVE), (CONTRASTIVE, SCALES)):
        if passed.intersection(asked):
            for name in set(other) - passed:
                setattr(config, name, None)
    config.passed_settings = sorted(passed)


def end_ids(eos_token_id: Any) -> list[int]:
    """What ends a document, as settings have it: one id, several, None, or -1 for none (continuous batching)."""
    if eos_token_id is None:
        return []
    ids = torch.as_tensor(eos_token_id).reshape(-1).tolist()
    return [int(i) for i in ids if i >= 0]


def document_rules(config: Any) -> DocumentRules | None:
    """None without a grammar."""
    least, most, after, places = (getattr(config, name) for name in LAYOUT_SETTINGS)
    if config.generation_mode is None:
        if any(setting is not None for setting in (least, most, after, places)):
            raise ValueError(f"{', '.join(LAYOUT_SETTINGS)} need generation_mode='interleaved'.")
        return None
    for name, ids in (("image_after_token_ids", after), ("image_positions", places)):
        whole = isinstance(ids, (list, tuple)) and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
        if ids is not None and not whole:
            raise ValueError(f"{name} must be a list of whole numbers, got {ids!r}.")
    return DocumentRules(config.generation_mode, 0 if least is None else least, most, tuple(after or ()), tuple(places or ()))


def guidance_settings(config: Any) -> GuidanceSettings | None:
    """None where the call has nothing to guide."""
    settings = GuidanceSettings(*(getattr(config, name) for name in GUIDANCE_SETTINGS))
    if not settings.branches and config._negative_prompt is not None:
        raise ValueError(
            "negative_prompt_ids have nothing to act on: set guidance_scale, or contrastive_alpha and contrastive_k."
        )
    return settings if settings.branches and config.generation_mode != "text" else None


def negative_prompts(ids: torch.Tensor | None, mask: Any, image_token_id: int) -> list[list[int]] | None:
    """Rows of the negative prompt, int64 `[B or 1, T]`, as lists without padding.

    Raises:
        ValueError: if they are no such ids, are blank, or have placeholders of pictures.
    """
    if ids is None:
        if mask is not None:
            raise ValueError("negative_prompt_attention_mask came without negative_prompt_ids: pass both, or neither.")
        return None
    mask = torch.ones_like(ids) if mask is None else torch.as_tensor(mask)
    if ids.ndim != 2 or ids.is_floating_point() or mask.shape != ids.shape or not bool(mask.any(1).all()):
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
    "JAM_SETTINGS",
    "LAYOUT_SETTINGS",
    "MODALITY_SETTINGS",
    "document_rules",
    "end_ids",
    "guidance_settings",
    "negative_prompts",
    "settle",
]
