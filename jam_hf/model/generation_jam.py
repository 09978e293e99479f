"""Writing interleaved documents: the grammar of pictures in a token sequence, guidance, and `generate()` for both.

It knows token ids only. The grammar is a plain object, tested without a model; its state is read off the ids themselves, so
it holds for each row of a batch on its own, whatever reorders or repeats the rows (beams, several return sequences).

Shape suffixes: B rows, T positions, V vocabulary, N codes a picture, L tokens of a picture (N where it is codes alone), R rows
inside a picture.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import DynamicCache, GenerationMixin, LogitsProcessor, LogitsProcessorList, QuantizedCache
from transformers.utils.generic import is_flash_attention_requested


if TYPE_CHECKING:
    from .configuration_jam import JamConfig

GENERATION_MODES = ("interleaved", "text", "image")


class PictureState(NamedTuple):
    """Where each row stands; all `[B]`.

    in_picture (bool): after an opening token, before the closing one. position (int64): tokens of that picture so far, which
    is its codes so far where a picture is codes alone. closed (bool): the last token closes a picture.
    """

    in_picture: torch.Tensor
    position: torch.Tensor
    closed: torch.Tensor


class PictureGrammar:
    """`text* (<break> N codes <break> text*)* <eos>`, row by row (paper, Decoding: one image of exactly N tokens).

    A `<break>` opens a picture unless a picture's token stands before it; then it closes one. Where the config's layout says
    more, `config.picture_template` stands in place of the N codes, and a closing token of its own leaves `<break>` to open.
    """

    def __init__(self, config: JamConfig, eos_token_ids: list[int] | None = None):
        """`eos_token_ids`: what ends a document; the config's where `None`."""
        self.break_token_id = config.break_token_id
        self.image_token_id = config.image_token_id
        self.first_code = config.image_token_offset
        self.last_code = config.image_token_offset + config.num_image_tokens - 1
        self.end_token_id = config.picture_end_token_id
        self.template, self.structure = config.picture_template, config.picture_structure_token_ids
        self.picture_length = config.picture_length
        self._tables: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        if eos_token_ids is None:
            eos_token_ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        self.eos_token_ids = [i for i in eos_token_ids if i is not None]
        reserved = [config.image_token_id, config.mask_end_token_id, config.pad_token_id]
        reserved += [config.mask_token_id + i for i in range(config.num_mask_tokens)]
        reserved += [*self.structure, config.image_end_token_id]
        self.reserved = [i for i in reserved if i is not None and i not in self.eos_token_ids]

    def _tables_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """`[L + 1]` and `[S]`: what stands at each position (-1: a code), the closing token last; the structure's ids.

        They are copied to a device once, not at every step.
        """
        if device not in self._tables:
            tables = ([*self.template, self.end_token_id], list(self.structure))
            self._tables[device] = tuple(torch.tensor(ids, dtype=torch.int64, device=device) for ids in tables)
        return self._tables[device]

    def is_picture_token(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """What stands between an opening and a closing token: image codes, their placeholders, the layout's own tokens."""
        tokens = (input_ids >= self.first_code) & (input_ids <= self.last_code)
        tokens = tokens | (input_ids == self.image_token_id)
        return tokens | torch.isin(input_ids, self._tables_on(input_ids.device)[1]) if self.structure else tokens

    def state(self, input_ids: torch.LongTensor) -> PictureState:
        """Read the state off the last L + 2 ids of each row; `input_ids` is int64 `[B, T]`.

        T is 0 where the prompt came as `inputs_embeds`, which say nothing of pictures: such a row stands in text.
        """
        if not input_ids.shape[1]:
            nothing = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
            return PictureState(nothing, nothing.long(), nothing)
        inside_BT = self.is_picture_token(input_ids[:, -(self.picture_length + 2) :])
        position = inside_BT.flip(1).to(torch.int64).cumprod(1).sum(1)
        opens, closes = input_ids[:, -1] == self.break_token_id, input_ids[:, -1] == self.end_token_id
        if self.end_token_id == self.break_token_id:
            after_picture = inside_BT[:, -2] if inside_BT.shape[1] > 1 else torch.zeros_like(opens)
            opens, closes = opens & ~after_picture, closes & after_picture
        return PictureState((position > 0) | opens, position, closes)

    def next_in_picture(self, state: PictureState) -> torch.LongTensor:
        """int64 `[B]`: the one id that may come next inside a picture, -1 for any code; of no meaning for rows in text."""
        return self._tables_on(state.position.device)[0][state.position.clamp(max=self.picture_length)]

    def last_pictures(self, sequences: torch.LongTensor) -> torch.LongTensor:
        """The codes of the last complete picture of each row: int64 `[B, T]`, as `generate()` returns it, to int64 `[B, N]`.

        Raises:
            ValueError: if a row has no complete picture (`<break>`, N codes, `<break>`, in the config's layout).
        """
        size, pictures = self.picture_length, []
        template_L = self._tables_on(sequences.device)[0][:-1]
        of_codes_L = template_L < 0
        codes_BT = (sequences >= self.first_code) & (sequences <= self.last_code)
        breaks_BT, ends_BT = sequences == self.break_token_id, sequences == self.end_token_id
        for row in range(sequences.shape[0]):
            for end in reversed(ends_BT[row].nonzero().flatten().tolist()):
                start = end - size
                if start <= 0 or not breaks_BT[row, start - 1]:
                    continue
                picture = sequences[row, start:end]
                if bool(torch.where(of_codes_L, codes_BT[row, start:end], picture == template_L).all()):
                    pictures.append(picture[of_codes_L])
                    break
            else:
                what = f"<break>, {int(of_codes_L.sum())} codes" + (" in their layout" if self.structure else "")
                end = "<break>" if self.end_token_id == self.break_token_id else f"the closing token {self.end_token_id}"
                raise ValueError(
                    f"Row {row} of the written ids has no complete picture ({what}, {end}). Expected what "
                    "generate(generation_mode='image') returns; post_process_interleaved takes documents of any kind apart."
                )
        return torch.stack(pictures)

    def allowed(
        self, input_ids: torch.LongTensor, vocab_size: int, mode: str, prompt_length: int, max_length: int
    ) -> torch.Tensor:
        """Which ids may come next.

        Args:
            input_ids: int64 `[B, T]`, prompt and what was written so far.
            mode: "interleaved" (pictures wherever the model opens one), "text" (none), "image" (one picture, at once).
            prompt_length, max_length: in tokens; a picture that could not be closed within `max_length` is not begun.
        Returns:
            bool `[B, V]`.
        """
        state = self.state(input_ids)
        length, device = input_ids.shape[1], input_ids.device
        text_V = torch.ones(vocab_size, dtype=torch.bool, device=device)
        text_V[self.first_code : self.last_code + 1] = False
        text_V[self.reserved] = False
        room = length + 2 + self.picture_length <= max_length
        text_V[self.break_token_id] = mode == "interleaved" and room
        codes_V = torch.zeros_like(text_V)
        codes_V[self.first_code : self.last_code + 1] = True
        break_V = torch.zeros_like(text_V)
        break_V[self.break_token_id] = True
        next_B1 = self.next_in_picture(state)[:, None]
        inside_BV = torch.where(next_B1 < 0, codes_V, torch.arange(vocab_size, device=device) == next_B1)
        if mode == "image":
            end_V = torch.zeros_like(text_V)
            end_V[self.eos_token_ids] = True
            done = state.closed & (length > prompt_length)
            if self.eos_token_ids and length:  # once closed, only the end is left; without an <eos>, max_length ends the row
                done = done | torch.isin(input_ids[:, -1], torch.tensor(self.eos_token_ids, device=device))
                outside_BV = torch.where(done[:, None], end_V, break_V)
            else:
                outside_BV = torch.where(done[:, None], text_V, break_V)
        else:
            outside_BV = text_V.expand(input_ids.shape[0], -1)
        return torch.where(state.in_picture[:, None], inside_BV, outside_BV)


class PictureGrammarLogitsProcessor(LogitsProcessor):
    """Sets the scores of ids that the grammar does not allow to minus infinity."""

    def __init__(self, grammar: PictureGrammar, mode: str, prompt_length: int, max_length: int):
        self.grammar, self.mode = grammar, mode
        self.prompt_length, self.max_length = prompt_length, max_length
        self.last_scores: torch.FloatTensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        allowed = self.grammar.allowed(input_ids, scores.shape[-1], self.mode, self.prompt_length, self.max_length)
        self.last_scores = scores.masked_fill(~allowed, float("-inf"))
        return self.last_scores


class PictureGrammarGuardLogitsProcessor(LogitsProcessor):
    """The last word is the grammar's: where the processors after it left a row none of its ids, its scores come back.

    `no_repeat_ngram_size`, `suppress_tokens` and `min_new_tokens` may forbid the one id that can follow (a closing `<break>`,
    an `<eos>`); without this the row would go on with id 0.
    """

    def __init__(self, first: PictureGrammarLogitsProcessor):
        self.first = first

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        allowed_scores = self.first.last_scores
        scores = scores.masked_fill(allowed_scores == float("-inf"), float("-inf"))
        empty_B1 = (scores == float("-inf")).all(-1, keepdim=True)
        return torch.where(empty_B1, allowed_scores, scores)


class PictureGuidanceLogitsProcessor(LogitsProcessor):
    """Classifier-free guidance for codes of a picture: `uncond + scale * (cond - uncond)` [P].

    Guided scores are log probabilities, so that beam search may add them to those of rows in text and of other pictures.
    The unconditional branch sees `<bos> <mask> <break>` and the picture so far [A], nothing of the prompt, with a cache of its
    own. The cache is used while the branch grows by one token per call, and rebuilt when other rows enter, leave or move; so
    the branch also runs where the layout, not the model, says what comes next, though nothing is guided there.
    """

    def __init__(self, model: Any, grammar: PictureGrammar, scale: float):
        self.model, self.grammar, self.scale = model, grammar, scale
        config = model.config
        prefix = [config.bos_token_id, config.mask_token_id, config.break_token_id]
        self.prefix = [i for i in prefix if i is not None]
        self.pad = config.pad_token_id if config.pad_token_id is not None else config.break_token_id
        self.cache: DynamicCache | None = None
        self.cached_ids: torch.LongTensor | None = None

    def branch(self, input_ids: torch.LongTensor, position: torch.LongTensor) -> tuple[torch.LongTensor, torch.LongTensor]:
        """Ids and mask, both int64 `[R, P + max position]`, left-padded, of the unconditional branch of rows `[R, T]`."""
        longest = int(position.max())
        prefix = torch.tensor(self.prefix, device=input_ids.device)
        ids = torch.full((input_ids.shape[0], len(prefix) + longest), self.pad, device=input_ids.device)
        mask = torch.zeros_like(ids)
        for row, count in enumerate(position.tolist()):
            start = longest - count
            mask[row, start:] = 1
            ids[row, start : start + len(prefix)] = prefix
            if count:
                ids[row, start + len(prefix) :] = input_ids[row, -count:]
        return ids, mask

    @torch.no_grad()
    def unconditional_logits(self, ids: torch.LongTensor, mask: torch.LongTensor) -> torch.FloatTensor:
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        grown = self.cached_ids is not None and torch.equal(ids[:, :-1], self.cached_ids)
        if not grown:
            self.cache = DynamicCache(config=self.model.config)
        new = 1 if grown else ids.shape[1]
        logits = self.model(
            input_ids=ids[:, -new:],
            attention_mask=mask,
            position_ids=position_ids[:, -new:],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        self.cached_ids = ids
        return logits[:, -1]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        state = self.grammar.state(input_ids)
        rows = (state.in_picture & (state.position < self.grammar.picture_length)).nonzero().flatten()
        if rows.numel() == 0:
            self.cache = self.cached_ids = None
            return scores
        ids, mask = self.branch(input_ids[rows], state.position[rows])
        uncond = self.unconditional_logits(ids, mask).to(scores)
        guided = (uncond + self.scale * (scores[rows] - uncond)).log_softmax(-1)
        if self.grammar.structure:
            a_code_comes_R1 = (self.grammar.next_in_picture(state)[rows] < 0)[:, None]
            guided = torch.where(a_code_comes_R1, guided, scores[rows])
        return scores.index_copy(0, rows, guided)


class JamGenerationMixin(GenerationMixin):
    """`generate()` with pictures: everything of `GenerationMixin`, plus `generation_mode` and guidance inside pictures."""

    output_modalities = ("image", "text")

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """Write text, pictures, or both.

        Args:
            generation_mode (`str`, *optional*): "interleaved", "text" or "image" (one picture, at once). `None` (and not
                set in the generation config): plain next-token generation without a grammar.
            guidance_scale (`float`, *optional*): classifier-free guidance inside pictures; 1.0 or `None`: none.
            pixel_values (float `[P, 3, H, W]`, *optional*): pictures of the prompt, as the processor makes them.
            num_candidates (`int`, *optional*), reranker (*optional*): draw so many candidates for each picture and keep the
                best; see `generate_best_pictures` in candidates_jam.py.

            Everything else as in `GenerationMixin.generate`. Pictures of the prompt come back as their codes. Where neither
            `max_new_tokens` nor `max_length` is set, a document may fill the model's positions; "image" mode makes its picture.
            Inside a picture the grammar outranks other processors that would leave a row nothing to go on with.

            Pipelines take the mode from the generation config: where that says "text" they write text only. A picture comes of
            `pipeline("any-to-any")(..., generation_mode="image", max_new_tokens=L + 2)` (L: `config.picture_length`).
        Raises:
            ValueError: on an unknown mode or guidance scale, placeholders without pictures, or no room for a picture in
                "image" mode.
        """
        defaults = self.generation_config
        if not hasattr(defaults, "generation_mode"):
            defaults.generation_mode = None
        mode = kwargs.get("generation_mode", getattr(generation_config, "generation_mode", defaults.generation_mode))
        if mode is not None and mode not in GENERATION_MODES:
            raise ValueError(f"generation_mode must be one of {', '.join(map(repr, GENERATION_MODES))}, got {mode!r}.")
        if kwargs.get("negative_prompt_ids") is not None:
            raise ValueError(
                "negative_prompt_ids are not supported: guidance compares with <mask> in place of the whole context. "
                "Leave them out."
            )

        num_candidates, reranker = kwargs.pop("num_candidates", None), kwargs.pop("reranker", None)
        pixel_values = kwargs.pop("pixel_values", None)
        if inputs is not None and "input_ids" not in kwargs:
            inputs, kwargs["input_ids"] = None, inputs
        input_ids = kwargs.get("input_ids")
        if pixel_values is not None:
            if input_ids is None:
                raise ValueError("pixel_values need input_ids with placeholders <image>; pass the processor's output.")
            kwargs["input_ids"] = self.model.insert_image_tokens(input_ids, pixel_values)
        elif input_ids is not None and bool((input_ids == self.config.image_token_id).any()):
            raise ValueError(
                "The prompt has placeholders <image> but no pixel_values came with it. Pass the picture(s) to the processor "
                "(images=[...]) and its whole output to generate()."
            )
        scale = kwargs.get("guidance_scale")
        if scale is not None and not (isinstance(scale, (int, float)) and math.isfinite(scale)):
            raise ValueError(f"guidance_scale must be a finite number or None, got {scale!r}.")
        if mode is not None and not any(
            getattr(source, name, None) if not isinstance(source, dict) else source.get(name)
            for source in (kwargs, generation_config, defaults)
            for name in ("max_length", "max_new_tokens")
        ):
            if mode == "image":
                kwargs["max_new_tokens"] = self.config.picture_length + 2
            else:
                kwargs["max_length"] = self.config.max_position_embeddings
        if num_candidates is not None or reranker is not None:
            from .candidates_jam import generate_best_pictures

            return generate_best_pictures(self, num_candidates, reranker, generation_config, inputs=inputs, **kwargs)
        with self._flash_attention_declared():
            return super().generate(inputs=inputs, generation_config=generation_config, **kwargs)

    @contextmanager
    def _flash_attention_declared(self) -> Iterator[None]:
        """GenerationMixin keeps the mask that flash-attention needs on a static cache if the whole model's config asks for
        flash-attention; here it does so while a single stream's config asks for it."""
        config = self.config
        asked = [c._attn_implementation for c in config.decoder_configs if is_flash_attention_requested(c)]
        own = config._attn_implementation_internal
        if asked and not is_flash_attention_requested(config):
            config._attn_implementation_internal = asked[0]
        try:
            yield
        finally:
            config._attn_implementation_internal = own

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, QuantizedCache):
            # Alone among the caches it counts `num_hidden_layers`; a cross JAM has more attentions than that.
            missing = len(self.config.per_layer_config) - len(cache.layers)
            cache.layers += [copy.deepcopy(cache.layers[0]) for _ in range(missing)]

    def _get_logits_processor(
        self, generation_config: Any, input_ids_seq_length: int | None = None, **kwargs: Any
    ) -> LogitsProcessorList:
        # A segment of a document (candidates_jam.py) counts from the document's prompt.
        input_ids_seq_length = getattr(generation_config, "document_prompt_length", input_ids_seq_length)
        # GenerationMixin would answer `guidance_scale` with a second forward over the whole prompt at every step.
        scale, generation_config.guidance_scale = generation_config.guidance_scale, None
        try:
            processors = super()._get_logits_processor(
                generation_config=generation_config, input_ids_seq_length=input_ids_seq_length, **kwargs
            )
        finally:
            generation_config.guidance_scale = scale
        if generation_config.is_assistant:  # a draft model: the processors of the model it drafts for come with the call
            return processors
        eos = generation_config.eos_token_id
        grammar = PictureGrammar(self.config, eos if isinstance(eos, list) else [eos])
        mode = getattr(generation_config, "generation_mode", None)
        ours = LogitsProcessorList()
        if scale is not None and scale != 1 and mode != "text":
            ours.append(PictureGuidanceLogitsProcessor(self, grammar, scale))
        if mode is not None:  # after guidance: minus infinity minus minus infinity is not a number
            max_length, needed = generation_config.max_length, self.config.picture_length + 1
            if mode == "image" and max_length - input_ids_seq_length < needed:
                raise ValueError(
                    f"generation_mode='image' needs room for a picture of {self.config.image_seq_length} codes and what stands "
                    f"around them: max_new_tokens={needed + 1}; got {max_length - input_ids_seq_length}."
                )
            ours.append(PictureGrammarLogitsProcessor(grammar, mode, input_ids_seq_length, max_length))
            processors.append(PictureGrammarGuardLogitsProcessor(ours[-1]))
        return LogitsProcessorList([*ours, *processors])


__all__ = [
    "JamGenerationMixin",
    "PictureGrammar",
    "PictureGrammarGuardLogitsProcessor",
    "PictureGrammarLogitsProcessor",
    "PictureGuidanceLogitsProcessor",
]
