# Licensed under the Apache License, Version 2.0.
"""JamModel and JamForCausalLM: stock decoders (one, or two in lockstep), a frozen VQ model and the output head.

It knows token ids and how pictures become ids; how two streams are mixed is modeling_jam_cross.py, how a document is
written token by token is generation_jam.py.

Shape suffixes: B batch, T positions, E embedding size, V vocabulary, K codebook, N codes a picture.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from .configuration_jam import JamConfig
from .families_jam import family_of
from .generation_jam import JamGenerationMixin
from .grammar_jam import PictureGrammar, as_ids
from .modeling_jam_cross import JamCrossDecoder, JamModelOutputWithPast, JamPreTrainedModel
from .modeling_jam_vq import JamVQModel
from .package_jam import from_package, tell
from .trainer_jam import teach_trainers
from .transformers_private_jam import (
    JanusVQVAEHead,
    create_masks_for_generate,
    resolve_hidden_states_indices,
    selected_hidden_states,
    slice_logits_to_keep,
    torch_compilable_check,
)


logger = logging.get_logger(__name__)


class JamModel(JamPreTrainedModel):
    """A JAM without its output head: `language_model` (the decoders) and `vq_model` (the frozen image tokenizer)."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.", r"^image_head\."]  # of a JamForCausalLM checkpoint

    def __init__(self, config: JamConfig):
        super().__init__(config)
        # CODEPATH: JAM-Cross has two decoders in lockstep, JAM-Uniform and JAM-Width are one stock decoder.
        if config.fusion_mode == "cross":
            self.language_model = JamCrossDecoder(config)
        else:
            family = family_of(config.text_config)
            self.language_model = family.class_of(family.decoder)(config.text_config)
        self.vq_model = JamVQModel(config.vq_config)
        self.vq_model.requires_grad_(False)
        tell("register_adapter_targets")
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.embed_tokens = value

    @torch.no_grad()
    def get_image_tokens(self, pixel_values: torch.Tensor) -> torch.LongTensor:
        """Pixels to image token ids: float `[P, 3, H, W]` in [-1, 1] -> int64 `[P, N]` (codes + their offset)."""
        return self.vq_model.encode(pixel_values) + self.config.image_token_offset

    @torch.no_grad()
    def decode_image_tokens(self, image_tokens: torch.LongTensor) -> torch.Tensor:
        """Image token ids to pixels: int64 `[P, N]` -> float `[P, 3, H, W]` in [-1, 1].

        Raises:
            ValueError: if a picture does not have exactly N ids, or an id is not an image code.
        """
        tokens = torch.as_tensor(image_tokens)
        first, last = self.config.image_token_range[0], self.config.image_token_range[-1]
        if tokens.is_floating_point() or (tokens.numel() and (tokens.min() < first or tokens.max() > last)):
            found = tokens.dtype if tokens.is_floating_point() else f"{int(tokens.min())}..{int(tokens.max())}"
            raise ValueError(f"image_tokens must be the ids of image codes, {first}..{last}, got {found}.")
        return self.vq_model.decode(tokens - first).clamp(*self.config.vq_config.pixel_range)

    def insert_image_tokens(self, input_ids: torch.LongTensor, pixel_values: torch.Tensor) -> torch.LongTensor:
        """Replace the placeholders `<image>` of `input_ids` `[B, T]` by the codes of the pictures, in reading order.

        Raises:
            ValueError: if the number of placeholders is not N times the number of pictures.
        """
        input_ids = as_ids(input_ids)
        image_tokens = self.get_image_tokens(pixel_values).flatten().to(input_ids.device)
        placeholders = input_ids == self.config.image_token_id
        found = placeholders.sum()
        torch_compilable_check(
            found == image_tokens.numel(),
            lambda: (
                f"The prompt has {int(found)} placeholders <image> for {pixel_values.shape[0]} picture(s) of "
                f"{self.config.image_seq_length} codes, which need {image_tokens.numel()}. Let JamProcessor make "
                "input_ids and pixel_values together."
            ),
        )
        return input_ids.masked_scatter(placeholders, image_tokens)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> JamModelOutputWithPast:
        """
        Args:
            input_ids (int64 `[B, T]`): text ids, image ids, or placeholders `<image>` where `pixel_values` are given.
            attention_mask (`[B, T]`): 1 for tokens, 0 for padding (either side).
            inputs_embeds (`[B, T, sum(config.embedding_sizes)]`): instead of `input_ids`; in the preserving cross form
                both streams' embeddings side by side, as `get_input_embeddings()` returns them.
            pixel_values (float `[P, 3, H, W]` in [-1, 1]): the pictures of the whole batch, in reading order.
        """
        input_ids = as_ids(input_ids)
        if pixel_values is not None:
            if input_ids is None:
                raise ValueError("pixel_values need input_ids with placeholders <image>; inputs_embeds have none.")
            input_ids = self.insert_image_tokens(input_ids, pixel_values)
        kwargs.setdefault("output_attentions", self.config.output_attentions)
        kwargs.setdefault("output_hidden_states", self.config.output_hidden_states)
        # CODEPATH: only JAM-Cross has an image stream to report.
        if self.config.fusion_mode == "cross":
            kwargs["output_image_hidden_states"] = bool(kwargs["output_hidden_states"])
            kwargs["output_image_attentions"] = kwargs["output_image_cross_attentions"] = kwargs["output_attentions"]
        outputs = self.language_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        outputs = JamModelOutputWithPast(**outputs)
        selected = selected_hidden_states(kwargs["output_hidden_states"])
        if selected is not None and outputs.image_hidden_states is not None:
            kept = resolve_hidden_states_indices(self.language_model, selected)
            outputs.image_hidden_states = tuple(
                states if depth in kept else None for depth, states in enumerate(outputs.image_hidden_states, start=1)
            )
        return outputs


@dataclass
class JamCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Outputs of [`JamForCausalLM`]: those of every causal LM, and the image stream's beside the text stream's.

    Args:
        image_hidden_states, image_attentions, cross_attentions, image_cross_attentions: see [`JamModelOutputWithPast`].
    """

    image_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    image_attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    image_cross_attentions: tuple[torch.FloatTensor, ...] | None = None


def is_trl_forward(value: Any) -> bool:
    """Whether `value` is the `forward` that trl puts in place of a model's own."""
    try:
        return "fused_lm_head" in inspect.signature(value, follow_wrapped=False).parameters
    except (TypeError, ValueError):
        return False


class JamForCausalLM(JamPreTrainedModel, JamGenerationMixin):
    """A JAM that writes: next-token logits over one vocabulary of text and image codes.

    `lm_head` is the one output projection. In the preserving cross form it reads the text stream, and the columns of
    the image codes come from `image_head`, which reads the image stream. Where the config asks for an MLP as
    `image_head` (`image_head_hidden_size`), those columns come from it in every mode; in the others it reads what
    `lm_head` reads. Quantisers skip `lm_head` and a linear `image_head`; an MLP if their skip list names it.
    """

    _tp_plan = {
        "lm_head": "colwise_gather_output",
        "image_head": "colwise_gather_output",
        "image_head.vision_head": "colwise_gather_output",  # of an MLP; its first layer is whole in every process
    }
    _fsdp_plan = {"lm_head": "keep_full_weight", "image_head": "keep_full_weight"}

    def __init__(self, config: JamConfig):
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # transformers reads it off the name of the class, which a subclass may change
        self.model = JamModel(config)
        self.vocab_size = config.vocab_size
        # CODEPATH: in the preserving form of JAM-Cross two embeddings lie side by side; no projection is tied to those.
        if len(config.embedding_sizes) == 1:
            self._tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
        self.lm_head = nn.Linear(config.embedding_sizes[0], config.vocab_size, bias=False)
        self.image_head = None
        # CODEPATH: JAMs with a Janus image parent have its MLP; of others, the preserving JAM-Cross has an image head.
        if config.image_head_hidden_size is not None:
            self.image_head = JanusVQVAEHead(
                JanusVQVAEConfig(
                    image_token_embed_dim=config.embedding_sizes[-1],
                    projection_dim=config.image_head_hidden_size,
                    num_embeddings=config.num_image_tokens,
                    hidden_act=config.image_head_act,
                )
            )
        elif len(config.embedding_sizes) == 2:  # CODEPATH: see above
            self.image_head = nn.Linear(config.embedding_sizes[1], config.num_image_tokens, bias=False)
        self.post_init()

    @property
    def accepts_loss_kwargs(self) -> bool:
        """The loss takes `num_items_in_batch`. A Trainer asks when made, and is told of codes (trainer_jam.py)."""
        teach_trainers()
        return True

    def get_image_tokens(self, pixel_values: torch.Tensor) -> torch.LongTensor:
        """See [`JamModel.get_image_tokens`]."""
        return self.model.get_image_tokens(pixel_values)

    def decode_image_tokens(self, image_tokens: torch.LongTensor) -> torch.Tensor:
        """See [`JamModel.decode_image_tokens`]. Sequences with `<break>`, as `generate()` returns them, give the last
        picture of each row, which is how `pipeline("any-to-any")` asks for it: int64 `[B, T]` -> float `[B, 3, H, W]`.
        """
        image_tokens = torch.as_tensor(image_tokens)
        # trf-ignore: TRF041 (the id of a token is read, as of those that the rule exempts)
        if image_tokens.ndim == 2 and bool((image_tokens == self.config.break_token_id).any()):
            image_tokens = PictureGrammar(self.config).last_pictures(image_tokens)
        return self.model.decode_image_tokens(image_tokens)

    def create_masks_for_generate(self, config: JamConfig, **kwargs: Any) -> torch.Tensor | dict[str, Any] | None:
        """For `generate()` with a static cache: the masks of a step, as the decoder itself would make them."""
        # CODEPATH: each stream of JAM-Cross may need masks of its own; the others are one stock decoder.
        if config.fusion_mode != "cross":
            return create_masks_for_generate(config=config.text_config, **kwargs)
        names = ("inputs_embeds", "attention_mask", "past_key_values", "position_ids")
        return self.model.language_model.masks_for_generate(**{name: kwargs.get(name) for name in names})

    def _check_that_no_picture_is_missing(self, input_ids: torch.LongTensor) -> None:
        """For training without `pixel_values`: placeholders in a row are a picture that was lost on its way here."""
        placeholders = input_ids == self.config.image_token_id
        if not bool(placeholders.any()):  # the usual case waits for the device once
            return
        # CODEPATH: where a picture is one code, a lone placeholder is a whole picture.
        if self.config.image_seq_length > 1:
            placeholders = placeholders[:, 1:] & placeholders[:, :-1]
        if bool(placeholders.any()):
            raise ValueError(
                "input_ids have placeholders <image>, but no pixel_values came with them: the model would learn the "
                "placeholder. Let the collator keep pixel_values (Trainer: remove_unused_columns=False), or encode the "
                "pictures beforehand."
            )
        logger.warning_once(
            "A placeholder <image> stands alone in the training text and will be learned as it is. Where it stands for "
            "a picture, let JamProcessor make input_ids and pixel_values together."
        )

    def encode_pictures(
        self, input_ids: torch.LongTensor, labels: torch.LongTensor | None, pixel_values: torch.Tensor | None
    ) -> tuple[torch.LongTensor, torch.LongTensor | None]:
        """Ids and labels, int64 `[B, T]`, with the codes of the pictures in place of their placeholders.

        Raises:
            ValueError: if placeholders and pictures do not match, or the placeholder itself would be learned.
        """
        if pixel_values is not None:
            tokens = self.model.insert_image_tokens(input_ids, pixel_values)
            if labels is not None:
                labels = torch.where(labels == self.config.image_token_id, tokens.to(labels.device), labels)
            return tokens, labels
        if labels is not None and not torch.compiler.is_compiling():
            self._check_that_no_picture_is_missing(input_ids)
        return input_ids, labels

    def head_logits(self, states_BTD: torch.Tensor, image_states_BTD: torch.Tensor, codes_alone: bool) -> torch.Tensor:
        """Logits `[B, T, V]` of both heads, or `[B, T, K]` of the codes alone."""
        first, last = self.config.image_token_range.start, self.config.image_token_range.stop
        if self.image_head is None:
            head = self.lm_head
            return nn.functional.linear(states_BTD, head.weight[first:last]) if codes_alone else head(states_BTD)
        codes_BTK = self.image_head(image_states_BTD)
        if codes_alone:
            return codes_BTK
        logits_BTV = self.lm_head(states_BTD)
        return torch.cat((logits_BTV[..., :first], codes_BTK.to(logits_BTV.device), logits_BTV[..., last:]), dim=-1)

    def __setattr__(self, name: str, value: Any) -> None:
        """As in `nn.Module`; what trl's trainers put in place of `forward` gets a JAM's logits (integrations/trl.py).

        Raises:
            ImportError: on such a `forward` where the model's code came out of a checkpoint's folder.
        """
        if name == "forward" and is_trl_forward(value):
            value = from_package("trl", "Training by trl")(self, value)
        super().__setattr__(name, value)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_logits_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> JamCausalLMOutputWithPast:
        """See [`JamModel.forward`].

        Args:
            labels (int64 `[B, T]`): ids to predict, -100 to ignore; they are shifted here. Where `pixel_values` are
                given, placeholders `<image>` in the labels become the codes, so that image tokens are trained on.
            image_logits_only: return the logits of the K codes alone, `[B, T, K]`; no loss then.
        Returns:
            `JamCausalLMOutputWithPast` with logits `[B, T, V]`; `hidden_states` and `attentions` are the text stream's.
        """
        if input_ids is not None:
            input_ids, labels = self.encode_pictures(input_ids, as_ids(labels, "labels"), pixel_values)
            pixel_values = None
        outputs: JamModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            use_cache=use_cache,
            **kwargs,
        )
        states_BTD = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        image_states_BTD = states_BTD  # one last state for both heads: uniform, width and the paper's cross form
        if outputs.image_last_hidden_state is not None:
            image_states_BTD = slice_logits_to_keep(outputs.image_last_hidden_state, logits_to_keep)
        logits_BTV = self.head_logits(states_BTD, image_states_BTD, image_logits_only)
        loss = None
        if labels is not None and not image_logits_only:
            loss = self.loss_function(logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return JamCausalLMOutputWithPast(
            loss=loss,
            logits=logits_BTV,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            image_attentions=outputs.image_attentions,
            cross_attentions=outputs.cross_attentions,
            image_cross_attentions=outputs.image_cross_attentions,
        )


__all__ = ["JamForCausalLM", "JamModel"]
