"""Guidance of pictures: what the branches beside the document see, how they are run, how logits are put together.

A branch is a context of its own for the picture that is being drawn: `<mask>` in place of the document, a negative
prompt, or the document's pictures alone. `SeparateGuidance` runs each in forwards of its own. With jam_hf, branches
share the document's forward where cache and attention allow it (generation/packed_guidance.py), which gives the same
and is faster.

It knows the grammar's states; it does not know how a document is written (generation_jam.py).

Shape suffixes: B rows, R rows inside a picture, K codes of the codebook, Q ids fed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, LogitsProcessor

from .grammar_jam import PictureGrammar, PictureReader, left_padded
from .rotation_jam import rotated_alone, rotation


if TYPE_CHECKING:
    from transformers import Cache

    from .configuration_jam import JamConfig

UNCONDITIONAL, PICTURES = "unconditional", "pictures"


@dataclass(frozen=True)
class GuidanceSettings:
    """How the logits of codes are guided; validated when it is built.

    scale: classifier-free guidance, `uncond + scale * (cond - uncond)` [P]. `None` or 1: none.
    image_scale: with it, two scales, as image editing by diffusion has them (ours [R]):
        `uncond + image_scale * (pictures - uncond) + scale * (cond - pictures)`, where the middle branch sees the
        document's pictures, its text being masked.
    contrastive_alpha, contrastive_k: CD-K [C]: `log p_cond - log p_uncond` for codes with
        `p_cond >= alpha * (k-th largest p_cond)`, minus infinity for the rest; instead of a scale.
    """

    scale: float | None = None
    image_scale: float | None = None
    contrastive_alpha: float | None = None
    contrastive_k: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("guidance_scale", self.scale), ("image_guidance_scale", self.image_scale)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and math.isfinite(value)):
                raise ValueError(f"{name} must be a finite number or None, got {value!r}.")
        alpha, k = self.contrastive_alpha, self.contrastive_k
        if (alpha is None) != (k is None):
            raise ValueError("Contrastive decoding (CD-K) needs both contrastive_alpha and contrastive_k, or neither.")
        if alpha is not None:
            if not (isinstance(alpha, (int, float)) and 0 <= alpha <= 1):
                raise ValueError(f"contrastive_alpha must be a number from 0 to 1, got {alpha!r}.")
            if not isinstance(k, int) or isinstance(k, bool) or k < 1:
                raise ValueError(f"contrastive_k must be a whole number of codes, 1 or more, got {k!r}.")
            if self.scale not in (None, 1) or self.image_scale is not None:
                raise ValueError(
                    "contrastive_alpha and contrastive_k take the place of guidance_scale and image_guidance_scale: "
                    "set one or the other."
                )

    @property
    def branches(self) -> tuple[str, ...]:
        """The branches that are needed, in the order in which `combine` takes them."""
        if self.image_scale is not None:
            return (UNCONDITIONAL, PICTURES)
        return (UNCONDITIONAL,) if self.contrastive_alpha is not None or self.scale not in (None, 1) else ()

    def combine(self, cond: torch.Tensor, *branches: torch.Tensor) -> torch.Tensor:
        """Log probabilities of the codes, so that beam search may add them to those of other rows: float `[..., K]`."""
        if self.contrastive_alpha is not None:
            cond, uncond = cond.log_softmax(-1), branches[0].log_softmax(-1)
            kth = cond.topk(min(self.contrastive_k, cond.shape[-1]), dim=-1).values[..., -1:]
            # alpha * p: in logarithms a sum; of alpha = 0 it is minus infinity, and every code is left.
            least = kth + (math.log(self.contrastive_alpha) if self.contrastive_alpha else -math.inf)
            return (cond - uncond).masked_fill(cond < least, -math.inf).log_softmax(-1)
        scale = 1 if self.scale is None else self.scale
        if self.image_scale is None:
            return (branches[0] + scale * (cond - branches[0])).log_softmax(-1)
        uncond, pictures = branches
        return (uncond + self.image_scale * (pictures - uncond) + scale * (cond - pictures)).log_softmax(-1)


def unconditional_context(config: JamConfig) -> list[int]:
    """What the unconditional branch sees before a picture's opening `<break>`: `<bos> <mask>` [A]."""
    return [i for i in (config.bos_token_id, config.mask_token_id) if i is not None]


class BranchContexts:
    """The ids that a branch sees before a picture's opening `<break>`, row by row."""

    def __init__(self, config: JamConfig, grammar: PictureGrammar, negative: list[list[int]] | None = None):
        """`negative`: contexts in place of the unconditional one, one for each row of the batch, or one for all; an
        opening `<break>` at their end may be left out.

        Raises:
            ValueError: on ids that the model does not know, contexts that leave its positions no room for a picture,
                and a picture that is begun and not closed.
        """
        self.config, self.grammar = config, grammar
        self.negative = None if negative is None else [self._checked(row) for row in negative]

    def _checked(self, ids: list[int]) -> list[int]:
        state = self.grammar.state(torch.tensor([ids], dtype=torch.int64))
        if bool(state.position > 0):
            raise ValueError(
                f"negative_prompt_ids end in a picture that has {int(state.position)} tokens and is not closed. A "
                "negative prompt is what stands before the picture that is drawn: close it, or take it out."
            )
        if min(ids) < 0 or max(ids) >= self.config.vocab_size:
            raise ValueError(
                f"negative_prompt_ids hold {min(ids)}..{max(ids)}; expected ids in 0..{self.config.vocab_size - 1}."
            )
        context = ids[:-1] if bool(state.in_picture) else ids  # one that closes a picture stays
        needed, positions = len(context) + self.grammar.picture_length + 1, self.config.max_position_embeddings
        if needed > positions:
            raise ValueError(
                f"negative_prompt_ids have {len(context)} ids; with a picture of {self.grammar.picture_length} tokens "
                f"they are {needed}, more than the {positions} positions of the model. Shorten the negative prompt."
            )
        return context

    def before_picture(self, branch: str, document: list[int], row: int, rows: int) -> list[int]:
        """`document`: the row's ids before the opening `<break>`, without padding; `row` of `rows` in the batch.

        Unconditional: `<bos> <mask>` [A]. Pictures: each run of text becomes a `<mask>`, numbered as in CM3 training,
        and the pictures stay.
        """
        if branch == UNCONDITIONAL:
            if self.negative is not None:
                return self.negative[row * len(self.negative) // rows]
            return unconditional_context(self.config)
        context = [] if self.config.bos_token_id is None else [self.config.bos_token_id]
        masks, in_text = 0, False
        inside = self.grammar.is_picture_token(torch.tensor(document, dtype=torch.int64)).tolist()
        ends = {self.grammar.break_token_id, self.grammar.end_token_id}
        for token, is_picture in zip(document, inside):
            if is_picture or token in ends:
                context.append(token)
                in_text = False
            elif token != self.config.bos_token_id and not in_text:
                context.append(self.config.mask_token_id + min(masks, self.config.num_mask_tokens - 1))
                masks, in_text = masks + 1, True
        return context


class Guidance:
    """What both ways to run the branches share: which rows are guided, what each branch sees before a picture."""

    def __init__(
        self,
        model: Any,
        settings: GuidanceSettings,
        reader: PictureReader,
        contexts: BranchContexts,
        prompt_mask: torch.Tensor | None = None,
        embedded: int = 0,
    ):
        """`prompt_mask`: `[B, T]`, 0 for the prompt's padding; `None` where there is none. `embedded`: tokens of the
        prompt that came as `inputs_embeds` and have no ids."""
        self.model, self.settings, self.reader, self.contexts = model, settings, reader, contexts
        self.grammar, self.prompt_mask, self.embedded = reader.grammar, prompt_mask, embedded
        config = model.config
        self.pad = config.pad_token_id if config.pad_token_id is not None else config.break_token_id

    def guided(self, input_ids: torch.LongTensor) -> list[int]:
        """Each row's position in a picture that has codes to come, -1 for the others."""
        length = self.grammar.picture_length
        return [p if p < length else -1 for p in self.reader.host_positions(input_ids)]

    def branch_ids(self, branch: str, input_ids: torch.LongTensor, row: int, position: int) -> list[int]:
        """What the branch sees of a row, `position` tokens into a picture: its context, `<break>`, the picture."""
        ids = input_ids[row].tolist()
        start = len(ids) - position - 1
        if start < 0:  # a prompt that came as embeddings and opened a picture
            start, ids = 0, [self.grammar.break_token_id, *ids]
        document = ids[:start]
        if self.prompt_mask is not None:
            mask = self.prompt_mask[row, self.embedded :].tolist()
            document = [token for place, token in enumerate(document) if place >= len(mask) or mask[place]]
        before = self.contexts.before_picture(branch, document, row, input_ids.shape[0])
        return [*before, *ids[start:]]

    @torch.no_grad()
    def _forward(self, ids: torch.Tensor, position_ids: torch.Tensor, cache: Cache, **seen: Any) -> torch.Tensor:
        """Ids int64 `[R, Q]` -> logits of codes behind the last, `[R, K]`."""
        logits = self.model(
            input_ids=ids, position_ids=position_ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **seen
        ).logits
        return logits[:, -1, self.grammar.codes]

    def logits(self, input_ids: torch.LongTensor) -> list[torch.Tensor] | None:
        """For each branch, the logits of codes `[B, K]` (meaningless for rows not guided); None where none is."""
        raise NotImplementedError


class SeparateGuidance(Guidance):
    """Each branch in forwards of its own over the rows inside pictures, with a cache of its own.

    A cache is used while its branch grows by one token a call, and made anew when rows enter, leave or move. Rows whose
    branches are rotated differently (rotation_jam.py) go apart; one that comes to be rotated otherwise is read anew.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.caches: dict[tuple[Any, ...], tuple[torch.LongTensor, DynamicCache]] = {}

    def logits(self, input_ids: torch.LongTensor) -> list[torch.Tensor] | None:
        positions = self.guided(input_ids)
        rows = [row for row, position in enumerate(positions) if position >= 0]
        if not rows:
            self.caches.clear()
            return None
        results, earlier, self.caches = [], self.caches, {}
        for branch in self.settings.branches:
            told = {row: self.branch_ids(branch, input_ids, row, positions[row]) for row in rows}
            together: dict[tuple[int, ...], list[int]] = {}
            for row, ids in told.items():
                together.setdefault(rotation(self.model.config.decoder_configs, len(ids)), []).append(row)
            logits_BK = None
            for turned, group in together.items():
                ids, mask = left_padded([told[row] for row in group], self.pad, input_ids.device)
                logits_RK = self._branch_logits((branch, turned), ids, mask, earlier)
                if logits_BK is None:
                    logits_BK = logits_RK.new_zeros(len(positions), logits_RK.shape[-1])
                logits_BK = logits_BK.index_copy(0, torch.tensor(group, device=logits_RK.device), logits_RK)
            results.append(logits_BK)
        return results

    def _branch_logits(
        self,
        branch: tuple[Any, ...],
        ids: torch.LongTensor,
        mask: torch.LongTensor,
        earlier: dict[tuple[Any, ...], Any],
    ) -> torch.Tensor:
        """Ids and mask int64 `[R, Q]` -> logits of codes `[R, K]`. `earlier`: `caches` of the call before this one."""
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        seen, cache = earlier.get(branch, (None, None))
        grown = seen is not None and torch.equal(ids[:, :-1], seen)
        if not grown:
            cache = DynamicCache(config=self.model.config)
        new = 1 if grown else ids.shape[1]
        self.caches[branch] = (ids, cache)
        with rotated_alone(self.model):
            return self._forward(ids[:, -new:], position_ids[:, -new:], cache, attention_mask=mask)


class PictureGuidanceLogitsProcessor(LogitsProcessor):
    """Puts guided log probabilities in the place of codes' scores, in rows where a code comes next.

    There nothing else may come: the other ids of such a row get minus infinity, whatever the generation mode.
    """

    def __init__(self, guidance: Guidance):
        self.guidance = guidance
        self.last_scores: torch.FloatTensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.last_scores = self._guided(input_ids, scores)
        return self.last_scores

    def _guided(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        guidance, grammar = self.guidance, self.guidance.grammar
        branches = guidance.logits(input_ids)
        if branches is None:
            return scores
        guided = torch.full_like(scores, -math.inf)
        others = (logits.to(scores) for logits in branches)
        guided[:, grammar.codes] = guidance.settings.combine(scores[:, grammar.codes], *others)
        return torch.where(grammar.awaits_code(guidance.reader(input_ids))[:, None], guided, scores)


__all__ = [
    "BranchContexts",
    "Guidance",
    "GuidanceSettings",
    "PictureGuidanceLogitsProcessor",
    "SeparateGuidance",
    "unconditional_context",
]
