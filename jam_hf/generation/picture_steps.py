"""What makes `generate()` fast: a cache that grows in blocks, guidance in the document's own forward, a part of the
head.

The model asks for it through its one door. A checkpoint's own code writes the same documents without it: with
transformers' caches, and with a forward for each branch of guidance.

Shape suffixes: B rows, T positions, K codes of the codebook.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig

from ..model.calls_jam import JamCall
from ..model.generation_jam import ROWS_FOLLOW
from ..model.grammar_jam import PictureReader
from ..model.guidance_jam import Guidance
from .block_cache import JamBlockCache
from .packed_guidance import PackedGuidance


# transformers' loops that feed one id of each row at a time.
STEP_BY_STEP = (*ROWS_FOLLOW, "beam_search", "beam_sample")


class PictureSteps:
    """What a call changes in single steps of the loop over its cache.

    Inside pictures, branches of guidance are packed beside the document, and where every row awaits a code, the image
    rows of the head alone are computed.
    """

    def __init__(self, cache: Any, reader: PictureReader, packed: PackedGuidance | None, codes_alone: bool):
        self.cache, self.reader, self.packed, self.codes_alone = cache, reader, packed, codes_alone
        self.vocab_size: int | None = None  # to which logits of codes alone are widened again

    def prepare(self, input_ids: torch.LongTensor, model_inputs: dict[str, Any], vocab_size: int) -> dict[str, Any]:
        self.vocab_size = None
        if self.packed is not None:
            model_inputs = self.packed.prepare(input_ids, model_inputs)
        if self.codes_alone:
            next_ids = self.reader.grammar.next_ids
            if all(p >= 0 and next_ids[min(p, len(next_ids) - 1)] < 0 for p in self.reader.host_positions(input_ids)):
                self.vocab_size = vocab_size
                model_inputs = model_inputs | {"image_logits_only": True}
        return model_inputs

    def take(self, outputs: Any) -> None:
        if self.packed is not None:
            self.packed.take(outputs)
        if self.vocab_size is not None:
            codes_BTK = outputs.logits
            # Least, not minus infinity: a row that a stopping criterion has ended meanwhile must have something to
            # choose from.
            outputs.logits = codes_BTK.new_full(
                (*codes_BTK.shape[:-1], self.vocab_size), torch.finfo(codes_BTK.dtype).min
            )
            outputs.logits[..., self.reader.grammar.codes] = codes_BTK
            self.vocab_size = None

    def reorder(self, rows: torch.LongTensor) -> None:
        if self.packed is not None:
            self.packed.reorder(rows)

    def close(self) -> None:
        """A cache that outlives the call is left with the document alone."""
        if self.packed is not None:
            self.packed.settle()


def block_cache(config: PreTrainedConfig) -> JamBlockCache:
    """In place of a `DynamicCache`, where rows go on from themselves; beams would make it copy all at every step."""
    return JamBlockCache(config=config)


def columns_beside(config: Any, call: JamCall, max_length: int) -> int:
    """What guidance adds to the cache, at most. A document's pictures have no bound but the document's own."""
    settings = call.settings.guidance()
    longest = max(map(len, call.settings.negative_prompt_ids or [[0, 0]]))
    if settings.image_scale is not None:
        longest = max(longest, max_length)
    return PackedGuidance.columns_beside(config.picture_length, settings, longest)


def packed_guidance(
    shared: tuple[Any, ...], call: JamCall, generation_config: Any, cache: Cache
) -> PackedGuidance | None:
    """Guidance in the document's own forward; None where columns cannot be laid into this cache. `shared`: of
    [`Guidance`].
    """
    model, settings, reader, *_, embedded = shared
    beside = columns_beside(model.config, call, generation_config.max_length)
    stepwise = call.loop in STEP_BY_STEP and not generation_config.output_attentions
    longest = max(generation_config.max_length + embedded, beside // (2 * len(settings.branches)))
    if stepwise and PackedGuidance.serves(model, cache, beside, generation_config.max_length, longest):
        return PackedGuidance(*shared, cache=cache, beside=beside)
    return None


def picture_steps(
    model: Any, cache: Cache | None, reader: PictureReader, guidance: Guidance | None, codes_alone: bool
) -> PictureSteps | None:
    """What changes steps over this cache; None where nothing does. `codes_alone`: whether all rows' logits may be
    of codes.
    """
    packed, codes_alone = (
        guidance if isinstance(guidance, PackedGuidance) else None,
        codes_alone and _has_image_rows(model),
    )
    if cache is None or (packed is None and not codes_alone):
        return None
    return PictureSteps(cache, reader, packed, codes_alone)


def _has_image_rows(model: Any) -> bool:
    """Whether the logits of codes can be had without those of text."""
    head = model.lm_head
    plain = type(head) is nn.Linear and type(head.weight) is nn.Parameter and not hasattr(head, "_hf_hook")
    return model.image_head is not None or (plain and not head._forward_hooks and not head._forward_pre_hooks)


__all__ = ["PictureSteps", "block_cache", "columns_beside", "packed_guidance", "picture_steps"]
