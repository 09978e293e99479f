"""`generate()` with pictures: the grammar, guidance and settings by modality as citizens of transformers' generation.

The grammar is in grammar_jam.py and what guides pictures in guidance_jam.py; here they become logits processors and
steps of `GenerationMixin`, whose loops (greedy, sampling, beams, drafts) are used as they are.

Shape suffixes: B rows, T positions, V vocabulary, K codes of the codebook.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import (
    DynamicCache,
    GenerationMixin,
    LogitsProcessorList,
    QuantizedCache,
    StaticCache,
    StoppingCriteriaList,
    StopStringCriteria,
)

from .call_settings_jam import GUIDANCE_SETTINGS, WARPER_CLASSES, JamCallSettings, end_ids, negative_prompts
from .calls_jam import JamCall, current_call, running
from .grammar_jam import PictureGrammar, PictureReader, as_ids
from .guidance_jam import BranchContexts, Guidance, PictureGuidanceLogitsProcessor, SeparateGuidance
from .history_jam import look_back_by_modality
from .logits_process_jam import (
    PictureGrammarGuardLogitsProcessor,
    PictureGrammarLogitsProcessor,
    TextStopStringCriteria,
    warp_by_modality,
)
from .package_jam import PackageFunction, from_package, tell
from .transformers_private_jam import is_flash_attention_requested


# transformers' loops in which a row goes on from itself.
ROWS_FOLLOW = ("greedy_search", "sample")


class JamGenerationMixin(GenerationMixin):
    """`generate()` with pictures: everything of `GenerationMixin`, plus the settings of [`JamCallSettings`]."""

    output_modalities = ("image", "text")
    generate_batch = PackageFunction(method=True)
    init_continuous_batching = PackageFunction(method=True)

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """Write text, pictures, or both.

        Args:
            generation_mode, min_new_images, max_new_images, image_after_token_ids, image_positions, guidance_scale,
            image_guidance_scale, contrastive_alpha, contrastive_k, image_temperature, image_top_k, image_top_p,
            image_min_p, image_repetition_penalty, image_no_repeat_ngram_size (*optional*): see [`JamCallSettings`]
                (call_settings_jam.py); they may also stand in the generation config.
            negative_prompt_ids (int64 `[B or 1, T]`, *optional*), negative_prompt_attention_mask: what guidance turns
                away from, in place of `<mask>`.
            pixel_values (float `[P, 3, H, W]`, *optional*): pictures of the prompt, as the processor makes them.
            custom_generate (*optional*): as in `GenerationMixin`, or one of jam_hf.generation that takes the whole
                call: `BestOfN(num_candidates, reranker)` draws so many candidates for each picture and keeps the best;
                `WithRetrieval(retriever)` puts documents found for each prompt before it, which are in none of the
                sequences that come back.
            num_candidates (`int`), reranker, retriever (*optional*): short for these two.

            Everything else as in `GenerationMixin.generate`. Pictures of the prompt come back as their codes. Where
            neither `max_new_tokens` nor `max_length` is set, a document may fill the model's positions; "image" mode
            makes its picture. No picture is begun that the budget or the model's positions would cut off. Inside a
            picture the grammar outranks other processors that would leave a row nothing to go on with.

            Pipelines take the mode from the generation config: where that says "text" they write text only. A picture
            comes of `pipeline("any-to-any")(..., generation_mode="image", max_new_tokens=L + 2)` (L:
            `config.picture_length`).
        Raises:
            ValueError: on settings that are unknown, out of range or contradict each other, placeholders without
                pictures, or no room for the pictures that are asked for.
        """
        if inputs is not None:
            kwargs["inputs" if "input_ids" in kwargs else "input_ids"] = inputs
        short = {name: kwargs.pop(name, None) for name in ("num_candidates", "reranker", "retriever", "memory")}
        if asked := [name for name, value in short.items() if value is not None]:
            custom_generate = from_package("custom_generate", f"generate({asked[0]}=...)")
            kwargs["custom_generate"] = custom_generate(**short, then=kwargs.get("custom_generate"))
        return self.run_call(JamCall(self.call_settings(generation_config, kwargs), generation_config, kwargs))

    def run_call(self, call: JamCall) -> Any:
        """`generate()`, when it is known what was asked: a budget, the prompt's pictures, and transformers' own.

        A `custom_generate` that `takes_the_call` gets the model and the call in place of all that; it may make calls of
        its own.
        """
        custom = call.arguments.get("custom_generate")
        if getattr(custom, "takes_the_call", False):
            return custom(self, call)
        mode, own = call.settings.generation_mode, self.generation_config
        if mode is not None and all(call.setting(name, own) is None for name in ("max_length", "max_new_tokens")):
            room = self.config.max_position_embeddings
            call = call.with_settings(
                **{"max_new_tokens": self.config.picture_length + 2} if mode == "image" else {"max_length": room}
            )
        arguments = {name: value for name, value in call.arguments.items() if name != "pixel_values"}
        pixel_values, input_ids = call.arguments.get("pixel_values"), as_ids(arguments.get("input_ids"))
        if pixel_values is not None and input_ids is None:
            raise ValueError("pixel_values need input_ids with placeholders <image>; pass the processor's output.")
        if input_ids is not None:
            arguments["input_ids"] = call.prompt_ids = self.prompt_with_codes(input_ids, pixel_values)
        self._check_draft_model(arguments)
        with running(call):
            return super().generate(generation_config=call.generation_config, **arguments)

    def _check_draft_model(self, kwargs: dict[str, Any]) -> None:
        """Raises a `ValueError` where a draft model of other ids comes without what translates between the two."""
        draft = kwargs.get("assistant_model")
        if draft is None or not hasattr(draft, "config"):
            return
        ours, theirs = (config.get_text_config().vocab_size for config in (self.config, draft.config))
        if ours != theirs and (kwargs.get("tokenizer") is None or kwargs.get("assistant_tokenizer") is None):
            raise ValueError(
                f"The draft model (assistant_model) has {theirs} ids, this JAM {ours}, which has those of pictures "
                "too. Drafts are translated by both tokenizers: generate(..., assistant_model=draft, "
                "tokenizer=processor.tokenizer, assistant_tokenizer=AutoTokenizer.from_pretrained(<its folder>))."
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
                "The prompt has placeholders <image> but no pixel_values came with it. Pass the picture(s) to the "
                "processor (images=[...]) and its whole output to generate()."
            )
        return input_ids

    def call_settings(self, generation_config: Any, arguments: dict[str, Any] | None = None) -> JamCallSettings:
        """A JAM's own settings of a call with this generation config and `arguments`, out of which they are taken."""
        arguments = {} if arguments is None else arguments
        ids, mask = (arguments.pop(name, None) for name in ("negative_prompt_ids", "negative_prompt_attention_mask"))
        rows = negative_prompts(ids, mask, self.config.image_token_id)
        said = JamCallSettings.said(arguments, generation_config, self.generation_config)
        return JamCallSettings(**said, negative_prompt_ids=rows)

    @property
    def current_call(self) -> JamCall | None:
        """The call of `generate()` that this thread is in; for what runs in it (a `custom_generate`)."""
        return current_call()

    def _prepare_generation_config(self, generation_config: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """As in `GenerationMixin`, for a call of `generate()`; a JAM's own settings are in its `JamCall`."""
        call = current_call()
        if call is not None and call.prompt_length is not None:
            return copy.deepcopy(generation_config), kwargs
        config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        if call is not None:  # GenerationMixin would answer it with a second forward at every step, in text too
            config.guidance_scale = None
        return config, model_kwargs

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """As in `GenerationMixin`, with room for guidance in a static cache; the one that grows does so in blocks.

        What is done for speed alone is the package's (jam_hf/generation/picture_steps.py).
        """
        call = self._call_of(generation_config)
        if call.in_parts:
            return
        if call.arguments.get("custom_generate") is None:
            call.loop = generation_mode.value
        if generation_config.cache_implementation == "static":
            settings = call.settings.guidance()
            if settings is not None and settings.image_scale is None and not generation_config.is_assistant:
                max_cache_length += tell("columns_beside", self.config, call, generation_config.max_length, otherwise=0)
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, QuantizedCache):
            # Alone among the caches it counts `num_hidden_layers`; a cross JAM has more attentions than that.
            missing = len(self.config.per_layer_config) - len(cache.layers)
            cache.layers += [copy.deepcopy(cache.layers[0]) for _ in range(missing)]
        flash = any(map(is_flash_attention_requested, self.config.decoder_configs))
        if flash and isinstance(cache, StaticCache) and model_kwargs.get("attention_mask") is None:
            # GenerationMixin keeps a mask of ones for flash-attention, which needs it on a static cache, where the
            # whole model's config asks for it; here a single stream's may.
            position_ids = model_kwargs["position_ids"]
            model_kwargs["attention_mask"] = position_ids.new_ones(len(position_ids), generation_config._mask_length)
        ours = type(cache) is DynamicCache and not getattr(cache, "_is_user_defined", False) and not cache.offloading
        if ours and generation_config.cache_implementation in (None, "dynamic") and call.loop in ROWS_FOLLOW:
            model_kwargs["past_key_values"] = tell("block_cache", self.config, otherwise=cache)

    def _call_of(self, generation_config: Any) -> JamCall:
        """The call that this is; one by the config alone where a hook is called outside of `generate()`."""
        return current_call() or JamCall(self.call_settings(generation_config), generation_config, {})

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
        steps = self._steps_of(model_inputs.get("past_key_values"))
        if steps is None or is_first_iteration:
            return model_inputs
        return steps.prepare(input_ids, model_inputs, self.config.vocab_size)

    def _steps_of(self, cache: Any) -> Any:
        call = current_call()
        return None if call is None else call.steps_of(cache)

    def _update_model_kwargs_for_generation(self, outputs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        steps = self._steps_of(outputs.get("past_key_values"))
        if steps is not None:
            steps.take(outputs)
        return super()._update_model_kwargs_for_generation(outputs, *args, **kwargs)

    def _reorder_cache(self, past_key_values: Any, beam_idx: torch.LongTensor) -> Any:
        past_key_values.reorder_cache(beam_idx)
        steps = self._steps_of(past_key_values)
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
        if input_ids_seq_length is None:  # continuous batching, where each request has a length of its own
            grammar = from_package("continuous_grammar", "Continuous batching")(self, generation_config)
            return LogitsProcessorList([*grammar, *super()._get_logits_processor(generation_config)])
        call, model_kwargs = self._call_of(generation_config), model_kwargs or {}
        settings, negative = call.settings, call.settings.negative_prompt_ids
        prompt_rows = None if encoder_input_ids is None else len(encoder_input_ids)
        if negative is not None and prompt_rows is not None and len(negative) not in (1, prompt_rows):
            raise ValueError(
                f"negative_prompt_ids have {len(negative)} row(s), the prompt {prompt_rows}: give one, or one for each."
            )
        if call.in_parts:
            return LogitsProcessorList()
        # A segment of a document counts from the document's prompt.
        prompt_length = input_ids_seq_length if call.prompt_length is None else call.prompt_length
        processors = super()._get_logits_processor(
            generation_config, prompt_length, encoder_input_ids, model_kwargs=model_kwargs, **kwargs
        )
        if generation_config.is_assistant:  # a draft model: the call brings the processors of the one it drafts for
            return processors

        cache = model_kwargs.get("past_key_values")
        grammar = PictureGrammar(self.config, end_ids(generation_config.eos_token_id))
        embeds, mask = model_kwargs.get("inputs_embeds"), model_kwargs.get("attention_mask")
        if encoder_input_ids is not None and encoder_input_ids.ndim == 3 and input_ids_seq_length:
            encoder_input_ids = call.prompt_ids  # beside embeddings, which transformers hands on
        embedded = embeds.shape[1] if embeds is not None and not input_ids_seq_length else 0
        read = input_ids_seq_length + embedded if mask is None else mask.sum(1)
        room = generation_config.max_length - input_ids_seq_length
        room = torch.as_tensor(self.config.max_position_embeddings - read).clamp(max=room)
        follows, rules = call.loop in ROWS_FOLLOW, settings.rules()
        room_of_all = room + input_ids_seq_length - prompt_length
        reader = PictureReader(grammar, prompt_length, room_of_all, follows, enforced=rules is not None)

        ours = LogitsProcessorList()
        infills = any(getattr(processor, "fills_gaps", False) for processor in kwargs.get("logits_processor") or ())
        guidance = self._guidance(call, generation_config, reader, cache, mask, embedded, infills)
        if guidance is not None:
            ours.append(PictureGuidanceLogitsProcessor(guidance))
        if rules is not None:  # after guidance: minus infinity minus minus infinity is not a number
            grammar.check_rules(rules)
            if call.prompt_length is None:
                grammar.check_room(rules, room, encoder_input_ids if not embedded else None)
            ours.append(PictureGrammarLogitsProcessor(reader, rules))
        history_mask = None if mask is None else mask[:, embedded:]
        processors = look_back_by_modality(processors, settings, reader, history_mask, encoder_input_ids)
        if ours and any(not isinstance(processor, WARPER_CLASSES) for processor in processors):
            processors.append(PictureGrammarGuardLogitsProcessor(ours[-1]))
        if generation_config.do_sample:
            warp_by_modality(processors, settings, generation_config.num_beams, reader)
        codes_alone = rules is not None and follows and not generation_config.output_logits
        call.steps = tell("picture_steps", self, cache, reader, guidance, codes_alone)
        return LogitsProcessorList([*ours, *processors])

    def _get_stopping_criteria(self, generation_config: Any, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        call = self._call_of(generation_config)
        if call.in_parts:
            return StoppingCriteriaList()
        criteria = super()._get_stopping_criteria(generation_config, *args, **kwargs)
        if call.settings.generation_mode is None:  # then codes are words like others
            return criteria
        grammar = PictureGrammar(self.config)
        return StoppingCriteriaList(
            TextStopStringCriteria(each, grammar) if type(each) is StopStringCriteria else each for each in criteria
        )

    def _guidance(
        self, call: JamCall, config: Any, reader: PictureReader, cache: Any, mask: Any, embedded: int, infills: bool
    ) -> Guidance | None:
        """What runs the branches of this call, in the document's own forward where that can be; None without guidance.

        `config`: of transformers' loop. `mask`, `embedded`: see [`Guidance`]. `infills`: whether gaps are filled.
        """
        settings, negative = call.settings.guidance(), call.settings.negative_prompt_ids
        if settings is None:
            return None
        if infills:
            if not call.settings.asked.intersection(GUIDANCE_SETTINGS) and negative is None:
                return None  # the model's own settings are for whole pictures
            raise ValueError(
                "Infills are not guided: there is no unconditional branch for a part of a picture. Leave "
                "guidance_scale, image_guidance_scale, contrastive_alpha and negative_prompt_ids out."
            )
        contexts = BranchContexts(self.config, reader.grammar, negative)
        shared = (self, settings, reader, contexts, mask, embedded)
        return tell("packed_guidance", shared, call, config, cache) or SeparateGuidance(*shared)


__all__ = ["JamGenerationMixin"]
