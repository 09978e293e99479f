"""`generate()` with pictures: the grammar, guidance and settings by modality as citizens of transformers' generation.

The grammar is in grammar_jam.py and what guides pictures in guidance_jam.py; here they become logits processors and steps of
`GenerationMixin`, whose loops (greedy, sampling, beams, drafts) are used as they are.

Shape suffixes: B rows, T positions, V vocabulary, K codes of the codebook.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import (
    DynamicCache,
    GenerationMixin,
    LogitsProcessorList,
    QuantizedCache,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.utils.generic import is_flash_attention_requested

from .caching_jam import JamBlockCache
from .call_settings_jam import (
    CALL_SETTINGS,
    GUIDANCE_SETTINGS,
    JAM_SETTINGS,
    document_rules,
    end_ids,
    guidance_settings,
    negative_prompts,
    settle,
)
from .continuous_batching_jam import JamContinuousBatchingMixin, PictureGrammarContinuousLogitsProcessor
from .grammar_jam import GENERATION_MODES, PictureGrammar, PictureReader, as_ids
from .guidance_jam import (
    BranchContexts,
    Guidance,
    GuidanceSettings,
    PictureGuidanceLogitsProcessor,
    SeparateGuidance,
)
from .history_jam import look_back_by_modality
from .logits_process_jam import (
    WARPER_CLASSES,
    PictureGrammarGuardLogitsProcessor,
    PictureGrammarLogitsProcessor,
    TextStopStringCriteria,
    warp_by_modality,
)
from .package_jam import from_package
from .packed_columns_jam import attend_by_sdpa
from .packed_guidance_jam import PackedGuidance


class PictureSteps:
    """What a call of `generate()` changes in single steps of the loop; it sits on the cache, which is passed from step to step.

    Inside pictures, branches of guidance are packed beside the document, and where every row awaits a code, the image rows of
    the head alone are computed.
    """

    def __init__(self, reader: PictureReader, packed: PackedGuidance | None, codes_alone: bool):
        self.reader, self.packed, self.codes_alone = reader, packed, codes_alone
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
            # Least, not minus infinity: a row that a stopping criterion has ended meanwhile must have something to choose from.
            outputs.logits = codes_BTK.new_full((*codes_BTK.shape[:-1], self.vocab_size), torch.finfo(codes_BTK.dtype).min)
            outputs.logits[..., self.reader.grammar.codes] = codes_BTK
            self.vocab_size = None

    def reorder(self, rows: torch.LongTensor) -> None:
        if self.packed is not None:
            self.packed.reorder(rows)

    def close(self) -> None:
        if self.packed is not None:
            self.packed.settle()


class JamGenerationMixin(JamContinuousBatchingMixin, GenerationMixin):
    """`generate()` with pictures: everything of `GenerationMixin`, plus the settings of `JAM_SETTINGS`."""

    output_modalities = ("image", "text")

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """Write text, pictures, or both. The settings below may also stand in the generation config.

        Args:
            generation_mode (`str`, *optional*): "interleaved", "text" or "image" (one picture, at once). `None` (and not
                set in the generation config): plain next-token generation without a grammar.
            min_new_images, max_new_images (`int`, *optional*): pictures to finish in "interleaved" mode, one that is half-drawn
                in the prompt included.
            image_after_token_ids (`list[int]`, *optional*): a picture follows each of these ids of written text, and stands
                nowhere else (`processor.sentence_end_token_ids()` for one after each sentence).
            image_positions (`list[int]`, *optional*): pictures stand after so many ids of written text, and nowhere else.
            guidance_scale (`float`, *optional*): classifier-free guidance inside pictures [P]; 1.0 or `None`: none.
            negative_prompt_ids (int64 `[B or 1, T]`, *optional*), negative_prompt_attention_mask: what guidance turns away
                from, in place of `<mask>`.
            image_guidance_scale (`float`, *optional*): a scale of its own for the pictures of the context, beside
                `guidance_scale` for the whole.
            contrastive_alpha (`float`), contrastive_k (`int`, *optional*): CD-K [C] instead of guidance.
            image_temperature, image_top_k, image_top_p, image_min_p (*optional*): for codes, where they differ from
                `temperature` and so on, which hold for both where these are `None`.
            image_repetition_penalty (`float`), image_no_repeat_ngram_size (`int`, *optional*): over the codes of the document.
                Without `image_`, these and all that look back at what was written (history_jam.py) go by text alone.
            pixel_values (float `[P, 3, H, W]`, *optional*): pictures of the prompt, as the processor makes them.
            memory (`Memory`, *optional*): documents found for each prompt are put before it; they are in none of the
                sequences that come back (jam_hf/generation/retrieval_prompts.py).
            num_candidates (`int`, *optional*), reranker (*optional*): draw so many candidates for each picture and keep the
                best; see `generate_best_pictures` in jam_hf/generation/best_of_n.py.

            Everything else as in `GenerationMixin.generate`. Pictures of the prompt come back as their codes. Where neither
            `max_new_tokens` nor `max_length` is set, a document may fill the model's positions; "image" mode makes its picture.
            No picture is begun that the budget or the model's positions would cut off. Inside a picture the grammar outranks
            other processors that would leave a row nothing to go on with.

            Pipelines take the mode from the generation config: where that says "text" they write text only. A picture comes of
            `pipeline("any-to-any")(..., generation_mode="image", max_new_tokens=L + 2)` (L: `config.picture_length`).
        Raises:
            ValueError: on settings that are unknown, out of range or contradict each other, placeholders without pictures, or
                no room for the pictures that are asked for.
        """
        if (memory := kwargs.pop("memory", None)) is not None:
            generate_with_memory = from_package("memory", "generate(memory=...)")
            return generate_with_memory(self, memory, inputs, generation_config, kwargs)
        mode = self._setting("generation_mode", generation_config, kwargs)
        if mode is not None and mode not in GENERATION_MODES:
            raise ValueError(f"generation_mode must be one of {', '.join(map(repr, GENERATION_MODES))}, got {mode!r}.")

        num_candidates, reranker = kwargs.pop("num_candidates", None), kwargs.pop("reranker", None)
        pixel_values = kwargs.pop("pixel_values", None)
        if inputs is not None and "input_ids" not in kwargs:
            inputs, kwargs["input_ids"] = None, inputs
        if kwargs.get("input_ids") is not None:
            kwargs["input_ids"] = as_ids(kwargs["input_ids"])
        input_ids = kwargs.get("input_ids")
        if pixel_values is not None and input_ids is None:
            raise ValueError("pixel_values need input_ids with placeholders <image>; pass the processor's output.")
        if input_ids is not None:
            kwargs["input_ids"] = self.prompt_with_codes(input_ids, pixel_values)
        if mode is not None and all(
            self._setting(name, generation_config, kwargs) is None for name in ("max_length", "max_new_tokens")
        ):
            if mode == "image":
                kwargs["max_new_tokens"] = self.config.picture_length + 2
            else:
                kwargs["max_length"] = self.config.max_position_embeddings
        if kwargs.get("negative_prompt_ids") is not None:
            kwargs["negative_prompt_ids"] = as_ids(torch.as_tensor(kwargs["negative_prompt_ids"]), "negative_prompt_ids")
        if num_candidates is not None or reranker is not None:
            generate_best_pictures = from_package("num_candidates", "generate(num_candidates=..., reranker=...)")
            return generate_best_pictures(self, num_candidates, reranker, generation_config, inputs=inputs, **kwargs)
        kwargs["_negative_prompt"] = negative_prompts(
            kwargs.pop("negative_prompt_ids", None),
            kwargs.pop("negative_prompt_attention_mask", None),
            self.config.image_token_id,
        )
        self._check_draft_model(kwargs)
        kwargs["_prompt_ids"] = kwargs.get("input_ids")  # beside embeddings, which transformers hands on
        kwargs["_own_loop"] = kwargs.get("custom_generate") is not None
        output = None
        try:
            with self._flash_attention_declared():
                output = super().generate(inputs=inputs, generation_config=generation_config, **kwargs)
        finally:  # a cache that outlives the call is left with the document alone
            attend_by_sdpa(self.config.decoder_configs)
            for cache in (kwargs.get("past_key_values"), getattr(output, "past_key_values", None)):
                if getattr(cache, "picture_steps", None) is not None:
                    cache.picture_steps.close()
                    cache.picture_steps = None
        return output

    def _check_draft_model(self, kwargs: dict[str, Any]) -> None:
        """Raises a `ValueError` where a draft model of other ids comes without what translates between the two."""
        draft = kwargs.get("assistant_model")
        if draft is None or not hasattr(draft, "config"):
            return
        ours, theirs = (config.get_text_config().vocab_size for config in (self.config, draft.config))
        if ours != theirs and (kwargs.get("tokenizer") is None or kwargs.get("assistant_tokenizer") is None):
            raise ValueError(
                f"The draft model (assistant_model) has {theirs} ids, this JAM {ours}, which has those of pictures too. Drafts "
                "are translated by both tokenizers: generate(..., assistant_model=draft, tokenizer=processor.tokenizer, "
                "assistant_tokenizer=AutoTokenizer.from_pretrained(<folder of the draft model>))."
            )

    def prompt_with_codes(self, input_ids: torch.LongTensor, pixel_values: torch.Tensor | None) -> torch.LongTensor:
        """A prompt's ids, int64 `[B, T]`, with the codes of its pictures in place of their placeholders.

        Raises:
            ValueError: if there are placeholders and no pictures, or they do not match.
        """
        if pixel_values is not None:
            return self.model.insert_image_tokens(input_ids, pixel_values)
        if bool((input_ids == self.config.image_token_id).any()):
            raise ValueError(
                "The prompt has placeholders <image> but no pixel_values came with it. Pass the picture(s) to the processor "
                "(images=[...]) and its whole output to generate()."
            )
        return input_ids

    def _setting(self, name: str, generation_config: Any, kwargs: dict[str, Any]) -> Any:
        """A setting of this call: from its arguments, the config that came with it, or the model's own."""
        if name in kwargs:
            return kwargs[name]
        if getattr(generation_config, name, None) is not None:
            return getattr(generation_config, name)
        return getattr(self.generation_config, name, None)

    def _prepare_generation_config(self, generation_config: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """As in `GenerationMixin`; the settings of `JAM_SETTINGS` go with it, for this call."""
        arguments = {name: kwargs[name] for name in CALL_SETTINGS if name in kwargs}
        kwargs = {name: value for name, value in kwargs.items() if name not in JAM_SETTINGS}
        negative, own_loop = kwargs.pop("_negative_prompt", None), kwargs.pop("_own_loop", False)
        prompt_ids = kwargs.pop("_prompt_ids", None)
        config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        if getattr(generation_config, "document_prompt_length", None) is not None:  # complete: None is a setting, not a gap
            for name, value in vars(generation_config).items():
                if value is None and name not in kwargs:
                    setattr(config, name, None)
        settle(config, arguments, generation_config, self.generation_config)
        config._negative_prompt, config._own_loop, config._prompt_ids = negative, own_loop, prompt_ids
        return config, model_kwargs

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

    def _columns_beside(self, generation_config: Any, settings: GuidanceSettings) -> int:
        """What guidance adds to the cache, at most. A document's pictures have no bound but the document's own."""
        longest = max(map(len, generation_config._negative_prompt or [[0, 0]]))
        if settings.image_scale is not None:
            longest = max(longest, generation_config.max_length)
        return PackedGuidance.columns_beside(self.config.picture_length, settings, longest)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> None:
        """As in `GenerationMixin`, with room for guidance in a static cache; the one that grows does so in blocks."""
        generation_config._rows_follow = generation_mode in ("greedy_search", "sample") and not generation_config._own_loop
        if generation_config.cache_implementation == "static":
            settings = guidance_settings(generation_config)
            if settings is not None and settings.image_scale is None and not generation_config.is_assistant:
                max_cache_length += self._columns_beside(generation_config, settings)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, QuantizedCache):
            # Alone among the caches it counts `num_hidden_layers`; a cross JAM has more attentions than that.
            missing = len(self.config.per_layer_config) - len(cache.layers)
            cache.layers += [copy.deepcopy(cache.layers[0]) for _ in range(missing)]
        made_here = type(cache) is DynamicCache and not getattr(cache, "_is_user_defined", False) and not cache.offloading
        as_usual = generation_config.cache_implementation in (None, "dynamic")
        if made_here and as_usual and generation_config._rows_follow:  # beams would make it copy all at every step
            model_kwargs["past_key_values"] = JamBlockCache(config=self.config)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in `GenerationMixin`; inside pictures, the branches of guidance beside the document."""
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        steps = getattr(model_inputs.get("past_key_values"), "picture_steps", None)
        if steps is None or is_first_iteration:
            return model_inputs
        return steps.prepare(input_ids, model_inputs, self.config.vocab_size)

    def _update_model_kwargs_for_generation(self, outputs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        steps = getattr(outputs.get("past_key_values"), "picture_steps", None)
        if steps is not None:
            steps.take(outputs)
        return super()._update_model_kwargs_for_generation(outputs, *args, **kwargs)

    def _reorder_cache(self, past_key_values: Any, beam_idx: torch.LongTensor) -> Any:
        past_key_values.reorder_cache(beam_idx)
        steps = getattr(past_key_values, "picture_steps", None)
        if steps is not None:
            steps.reorder(beam_idx)
        return past_key_values

    def _get_logits_processor(
        self,
        generation_config: Any,
        input_ids_seq_length: int | None = None,
        encoder_input_ids: torch.Tensor | None = None,
        model_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> LogitsProcessorList:
        # A segment of a document (jam_hf/generation/best_of_n.py) counts from the document's prompt.
        segment = getattr(generation_config, "document_prompt_length", None)
        prompt_length = input_ids_seq_length if segment is None else segment
        # GenerationMixin would answer `guidance_scale` with a second forward over the whole prompt at every step.
        scale, generation_config.guidance_scale = generation_config.guidance_scale, None
        try:
            processors = super()._get_logits_processor(
                generation_config=generation_config,
                input_ids_seq_length=prompt_length,
                encoder_input_ids=encoder_input_ids,
                model_kwargs=model_kwargs,
                **kwargs,
            )
        finally:
            generation_config.guidance_scale = scale
        if input_ids_seq_length is None:  # continuous batching, where each request has a length of its own
            return LogitsProcessorList([*self._continuous_grammar(generation_config), *processors])
        model_kwargs = model_kwargs or {}
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            cache.picture_steps = None  # of an earlier call
        if generation_config.is_assistant:  # a draft model: the processors of the model it drafts for come with the call
            return processors

        grammar = PictureGrammar(self.config, end_ids(generation_config.eos_token_id))
        embeds, mask = model_kwargs.get("inputs_embeds"), model_kwargs.get("attention_mask")
        if encoder_input_ids is not None and encoder_input_ids.ndim == 3 and input_ids_seq_length:
            encoder_input_ids = generation_config._prompt_ids
        embedded = embeds.shape[1] if embeds is not None and not input_ids_seq_length else 0
        read = input_ids_seq_length + embedded if mask is None else mask.sum(1)
        room = generation_config.max_length - input_ids_seq_length
        room = torch.as_tensor(self.config.max_position_embeddings - read).clamp(max=room)
        follows = generation_config._rows_follow
        rules = document_rules(generation_config)
        room_of_all = room + input_ids_seq_length - prompt_length
        reader = PictureReader(grammar, prompt_length, room_of_all, follows, enforced=rules is not None)

        ours = LogitsProcessorList()
        prompt_rows = None if encoder_input_ids is None else len(encoder_input_ids)
        infills = any(getattr(processor, "fills_gaps", False) for processor in kwargs.get("logits_processor") or ())
        guidance = self._guidance(generation_config, reader, cache, mask, embedded, prompt_rows, infills)
        if guidance is not None:
            ours.append(PictureGuidanceLogitsProcessor(guidance))
        if rules is not None:  # after guidance: minus infinity minus minus infinity is not a number
            grammar.check_rules(rules)
            if segment is None:
                grammar.check_room(rules, room, encoder_input_ids if not embedded else None)
            ours.append(PictureGrammarLogitsProcessor(reader, rules))
        history_mask = None if mask is None else mask[:, embedded:]
        processors = look_back_by_modality(processors, generation_config, reader, history_mask, encoder_input_ids)
        if ours and any(not isinstance(processor, WARPER_CLASSES) for processor in processors):
            processors.append(PictureGrammarGuardLogitsProcessor(ours[-1]))
        if generation_config.do_sample:
            warp_by_modality(processors, generation_config, reader)
        codes_alone = rules is not None and follows and not generation_config.output_logits and self._has_image_rows()
        packed = guidance if isinstance(guidance, PackedGuidance) else None
        if cache is not None and (packed is not None or codes_alone):
            cache.picture_steps = PictureSteps(reader, packed, codes_alone)
        return LogitsProcessorList([*ours, *processors])

    def _get_stopping_criteria(self, generation_config: Any, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        criteria = super()._get_stopping_criteria(generation_config, *args, **kwargs)
        if generation_config.generation_mode is None:  # then codes are words like others
            return criteria
        grammar = PictureGrammar(self.config)
        return StoppingCriteriaList(
            TextStopStringCriteria(each, grammar) if type(each) is StopStringCriteria else each for each in criteria
        )

    def _guidance(
        self,
        generation_config: Any,
        reader: PictureReader,
        cache: Any,
        mask: torch.Tensor | None,
        embedded: int,
        prompt_rows: int | None,
        infills: bool,
    ) -> Guidance | None:
        """What runs the branches of this call, in the document's own forward where that can be; None without guidance.

        `mask`, `embedded`: see [`Guidance`]. `prompt_rows`: of the prompt, before beams and return sequences. `infills`:
        whether gaps are filled.
        """
        settings = guidance_settings(generation_config)
        if settings is None:
            return None
        if infills:
            asked = set(GUIDANCE_SETTINGS).intersection(generation_config.passed_settings)
            if not asked and generation_config._negative_prompt is None:  # the model's own settings are for whole pictures
                return None
            raise ValueError(
                "Infills are not guided: there is no unconditional branch for a part of a picture. Leave guidance_scale, "
                "image_guidance_scale, contrastive_alpha and negative_prompt_ids out."
            )
        negative = generation_config._negative_prompt
        if negative is not None and prompt_rows is not None and len(negative) not in (1, prompt_rows):
            raise ValueError(
                f"negative_prompt_ids have {len(negative)} row(s), the prompt {prompt_rows}: give one for all or one for each."
            )
        contexts = BranchContexts(self.config, reader.grammar, negative)
        shared = (self, settings, reader, contexts, mask, embedded)
        beside = self._columns_beside(generation_config, settings)
        stepwise = (reader.follows or generation_config.num_beams > 1) and not generation_config.output_attentions
        longest = max(generation_config.max_length + embedded, beside // (2 * len(settings.branches)))
        if stepwise and PackedGuidance.serves(self, cache, beside, generation_config.max_length, longest):
            return PackedGuidance(*shared, cache=cache, beside=beside)
        return SeparateGuidance(*shared)

    def _continuous_config(self, generation_config: Any) -> Any:
        """A complete copy, as `generate()` makes it; continuous batching asks the model's own config for nothing."""
        if getattr(generation_config, "_complete", False):
            return generation_config
        said = any(getattr(config, "max_length", None) is not None for config in (generation_config, self.generation_config))
        config, _ = self._prepare_generation_config(generation_config)
        if not said:  # a default of transformers' that counts from the prompt's end
            config.max_length = None
        if config.eos_token_id is None:
            config.eos_token_id = -1
        config._complete = True
        return config

    def _continuous_grammar(self, generation_config: Any) -> list[PictureGrammarContinuousLogitsProcessor]:
        """None, or the one of the grammar, where this is not a call of `generate()`."""
        rules = document_rules(generation_config)
        if rules is None:
            return []
        grammar = PictureGrammar(self.config, end_ids(generation_config.eos_token_id))
        return [PictureGrammarContinuousLogitsProcessor(grammar, rules, self.config.max_position_embeddings)]

    def _has_image_rows(self) -> bool:
        """Whether the logits of codes can be had without those of text."""
        head = self.lm_head
        plain = type(head) is nn.Linear and type(head.weight) is nn.Parameter and not hasattr(head, "_hf_hook")
        return self.image_head is not None or (plain and not head._forward_hooks and not head._forward_pre_hooks)


__all__ = ["JamGenerationMixin", "PictureSteps"]
