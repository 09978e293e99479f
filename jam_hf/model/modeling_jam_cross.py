# Licensed under the Apache License, Version 2.0.
"""JAM-Cross: two stock decoders in lockstep, with bidirectional cross-attention between them (paper: "JAM-Cross").

One module holds one depth: the text layer, the image layer and the cross blocks that follow them, so that a device map,
an offload or an FSDP wrap keeps a depth together (docs/architecture.md). It does not know about pixels, the output head
or how pictures are marked.

Shape suffixes: B batch, T new positions, S cached + new ones, D hidden size, H heads, K key/value heads, Q head size.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_jam import JamConfig
from .families_jam import attention_type, head_dim_of, key_value_heads_of
from .modeling_jam_families import (
    make_feed_forward,
    make_layer,
    make_norm,
    make_stem,
    masks_by_type,
    sliding_cache_index,
    states_of,
)
from .package_jam import from_package, tell
from .transformers_private_jam import (
    OutputRecorder,
    apply_rotary_pos_emb,
    capture_outputs,
    eager_attention_forward,
    merge_with_config_defaults,
)


# Parameters of the image tokenizer, in a JamModel and in a JamForCausalLM.
VQ_PREFIXES = ("vq_model.", "model.vq_model.")
# What the history of a JAM says when it was saved by its checkpoint's own code.
UNWATCHED = {"what": "saved without jam_hf, which would know whether the weights were changed"}


class ZeroInitLinear(nn.Linear):
    """A projection that starts at zero, so that the residual branch it ends adds nothing at step 0."""


class JamOutputProjection(nn.Linear):
    """The paper's new linear layer over both streams' final states; normal init with std d^-0.5 [A]."""


@dataclass
class JamModelOutputWithPast(ModelOutput):
    """Outputs of [`JamModel`]; the standard names are the text stream's (in uniform and width: the decoder's).

    Args:
        last_hidden_state (`[B, T, E]`): what the output projection reads (paper form: both streams, projected).
        past_key_values (`Cache`): one cache for all attentions, in the order of `JamConfig.per_layer_config`.
        hidden_states, attentions: text stream. A state is that after a depth, its cross block included: one more than
            depths (`JamConfig.num_hidden_layers`). Attentions: one for each text layer. A depth without a text layer,
            in streams of different depths, repeats the state and has no attention.
        image_last_hidden_state (`[B, T, E]`): what the image head reads (cross, preserving form).
        image_hidden_states, image_attentions: image stream: the states beside `hidden_states[1:]`; one for each layer.
        cross_attentions, image_cross_attentions: text reading image, image reading text; one entry per cross block.
    """

    last_hidden_state: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    image_last_hidden_state: torch.FloatTensor | None = None
    image_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    image_attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    image_cross_attentions: tuple[torch.FloatTensor, ...] | None = None


class JamCrossAttention(nn.Module):
    """Attention of one stream (queries) over the other (keys and values), causal, without biases [A].

    Heads are those of the query stream. A family with rotary positions rotates queries and keys here as in its own
    attention (our reconstruction: the paper's parents have learned positions, which their hidden states carry).
    """

    def __init__(self, config: PreTrainedConfig, key_value_size: int, layer_idx: int, output_class: type[nn.Linear]):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim, num_key_value_heads = head_dim_of(config), key_value_heads_of(config)
        self.num_key_value_groups = config.num_attention_heads // num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(key_value_size, num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(key_value_size, num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = output_class(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states `[B, T, D]`, key_value_states `[B, T, D']` -> (`[B, T, D]`, weights `[B, H, T, S]` or None)."""
        input_shape = hidden_states.shape[:-1]
        heads = (*input_shape, -1, self.head_dim)
        query_BHTQ = self.q_proj(hidden_states).view(heads).transpose(1, 2)
        key_BKTQ = self.k_proj(key_value_states).view(heads).transpose(1, 2)
        value_BKTQ = self.v_proj(key_value_states).view(heads).transpose(1, 2)
        if position_embeddings is not None:
            query_BHTQ, key_BKTQ = apply_rotary_pos_emb(query_BHTQ, key_BKTQ, *position_embeddings)
        if past_key_values is not None:
            key_BKTQ, value_BKTQ = past_key_values.update(key_BKTQ, value_BKTQ, self.layer_idx)
        kind, dropout = self.config._attn_implementation, self.attention_dropout if self.training else 0.0
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(kind, eager_attention_forward)
        output, weights = attend(
            self, query_BHTQ, key_BKTQ, value_BKTQ, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.reshape(*input_shape, -1).contiguous()), weights


class JamCrossBlock(GradientCheckpointingLayer):
    """What a stream gets after every `cross_attention_interval`-th pair of layers [A].

    A norm on the queries only (the other stream's states come un-normalised), causal cross-attention, residual, then a
    norm, a full FFN, residual. No biases, no gates.
    """

    def __init__(self, config: PreTrainedConfig, key_value_size: int, layer_idx: int, zero_init: bool):
        super().__init__()
        output_class = ZeroInitLinear if zero_init else nn.Linear
        self.cross_attn_layer_norm = make_norm(config)
        self.cross_attn = JamCrossAttention(config, key_value_size, layer_idx, output_class)
        self.final_layer_norm = make_norm(config)
        self.mlp = make_feed_forward(config)
        self.mlp.down_proj = output_class(self.mlp.down_proj.in_features, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor, key_value_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attended, _ = self.cross_attn(
            hidden_states=self.cross_attn_layer_norm(hidden_states), key_value_states=key_value_states, **kwargs
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.final_layer_norm(hidden_states))


class JamCrossDecoderLayer(nn.Module):
    """One depth of a JAM-Cross: a stock layer of each stream, then, at every interval, a cross block in each direction.

    In streams of different depths, a depth may hold a layer of the deeper one alone: the other is None. Not a
    GradientCheckpointingLayer itself: its four parts are, and checkpointing twice would compute twice.
    """

    def __init__(self, config: JamConfig, depth: int):
        super().__init__()
        text, image = config.text_config, config.image_config
        # Where each attention of this depth stands in the cache.
        places = {part: place for place, (at, part) in enumerate(config.visited_attentions) if at == depth}
        self.text_layer = self.image_layer = self.text_cross = self.image_cross = None
        self.text_attention_type = self.image_attention_type = "full_attention"
        if "text_layer" in places:
            layer = config.text_layer_depths.index(depth)
            self.text_layer = make_layer(text, layer, places["text_layer"])
            self.text_attention_type = attention_type(text, layer)
        if "image_layer" in places:
            layer = config.image_layer_depths.index(depth)
            self.image_layer = make_layer(image, layer, places["image_layer"])
            self.image_attention_type = attention_type(image, layer)
        if "text_cross" in places:
            zero_init = config.cross_form == "preserving"
            self.text_cross = JamCrossBlock(text, image.hidden_size, places["text_cross"], zero_init)
            self.image_cross = JamCrossBlock(image, text.hidden_size, places["image_cross"], zero_init)

    def forward(
        self,
        text_states: torch.Tensor,
        image_states: torch.Tensor,
        text_kwargs: dict[str, dict[str, Any]],
        image_kwargs: dict[str, dict[str, Any]],
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`[B, T, D_text]`, `[B, T, D_image]` -> the same. The dicts: masks and positions by kind of attention."""
        if self.text_layer is not None:
            text_states = states_of(self.text_layer(text_states, **text_kwargs[self.text_attention_type], **kwargs))
        if self.image_layer is not None:
            of_image = image_kwargs[self.image_attention_type]
            image_states = states_of(self.image_layer(image_states, **of_image, **kwargs))
        if self.text_cross is not None:
            # Both directions read the states from before either update [A]; so do the cached keys and values. Both go
            # by position: reentrant checkpointing sees no gradients of what goes by keyword.
            text_states, image_states = (
                self.text_cross(text_states, image_states, **text_kwargs["full_attention"], **kwargs),
                self.image_cross(image_states, text_states, **image_kwargs["full_attention"], **kwargs),
            )
        return text_states, image_states


class JamPreTrainedModel(PreTrainedModel):
    config: JamConfig
    config_class = JamConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    input_modalities = ("image", "text")
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["vq_model"]  # in half precision, near ties between codes would flip
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in `PreTrainedModel`. The VQ model comes back frozen: loading makes every float tensor trainable."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, parameter in model.named_parameters():
            if name.startswith(VQ_PREFIXES):
                parameter.requires_grad_(False)
        tell("model_loaded", model)
        return loaded

    def train(self, mode: bool = True) -> Any:
        """As in `nn.Module`; a trainer that is imported by now will carry a JAM's card on (jam_hf/provenance.py)."""
        tell("catch_card_writers")
        return super().train(mode)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in `PreTrainedModel`; the folder carries card and recipe on, with what was done (jam_hf/provenance.py)."""
        main, provenance = kwargs.get("is_main_process", True), self.config.provenance
        if main and not tell("before_saving", self, kwargs.get("state_dict")) and provenance:
            history = [entry for entry in provenance.get("history") or [] if entry != UNWATCHED]
            self.config.provenance = {**provenance, "history": [*history, UNWATCHED]}
        super().save_pretrained(save_directory, *args, **kwargs)
        if main:
            tell("carry_on", self.config, save_directory)  # an adapter that was added is saved without its config

    def _upload_modified_files(self, working_dir: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        tell("carry_on", self.config, working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def init_parallel_plans(self) -> None:
        """As in `PreTrainedModel`; how a JAM is split is jam_hf/integrations/sharding.py's."""
        super().init_parallel_plans()
        self._tp_plan, self._fsdp_plan, self._pp_plan = tell("parallel_plans", self, otherwise=({}, {}, {}))

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, *args: Any, **kwargs: Any) -> Any:
        """As in `PreTrainedModel`; see `split_for` in jam_hf/integrations/sharding.py."""
        if distributed_config is not None:
            split_for = from_package("split_for", "A model that is split over processes (tp_size, fsdp_size)")
            split_for(model, distributed_config)
        return super().maybe_distribute_model(model, distributed_config, *args, **kwargs)

    def _resolve_parallel_plans(self, distributed_config: Any) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
        """As in `PreTrainedModel`; in half precision too, the float32 image tokenizer stays one FSDP2 unit.

        Its codebook is read by the quantiser around it, so that it cannot be a unit of its own.
        """
        tp_plan, ep_plan, fsdp_plan = super()._resolve_parallel_plans(distributed_config)
        return tp_plan, ep_plan, {name: style for name, style in fsdp_plan.items() if not name.startswith(VQ_PREFIXES)}

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in `PreTrainedModel`; a vocabulary that would end before the last image code is refused."""
        codes = self.config.image_token_range
        if new_num_tokens is not None and new_num_tokens < min(codes.stop, self.config.vocab_size):
            raise ValueError(
                f"resize_token_embeddings: the image codes take the ids {codes[0]}..{codes[-1]}, so the "
                f"vocabulary needs at least {codes.stop} ids, got {new_num_tokens}."
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def set_attn_implementation(self, attn_implementation: str | dict, **kwargs: Any) -> None:
        """As in `PreTrainedModel`. The streams, no `PreTrainedModel`s of their own, are set without a warning."""
        # CODEPATH: only JAM-Cross has streams beside each other.
        if self.config.fusion_mode == "cross" and isinstance(attn_implementation, str):
            checked = self.get_correct_attn_implementation(attn_implementation)
            for stream in (self.config.text_config, self.config.image_config):
                stream._attn_implementation_internal = checked
        super().set_attn_implementation(attn_implementation, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ZeroInitLinear):
            init.zeros_(module.weight)
        elif isinstance(module, JamOutputProjection):
            init.normal_(module.weight, mean=0.0, std=module.out_features**-0.5)


class JamCrossDecoder(JamPreTrainedModel):
    """The two streams of a JAM-Cross, from embeddings to final states."""

    _no_split_modules = ["JamCrossDecoderLayer"]
    _can_record_outputs = {
        "hidden_states": OutputRecorder(JamCrossDecoderLayer, index=0),
        "attentions": OutputRecorder(None, index=1, class_name="text_layer.self_attn"),
        "image_hidden_states": OutputRecorder(JamCrossDecoderLayer, index=1),
        "image_attentions": OutputRecorder(None, index=1, class_name="image_layer.self_attn"),
        "cross_attentions": OutputRecorder(None, index=1, class_name="text_cross.cross_attn"),
        "image_cross_attentions": OutputRecorder(None, index=1, class_name="image_cross.cross_attn"),
    }

    def __init__(self, config: JamConfig):
        super().__init__(config)
        text, image = config.text_config, config.image_config
        for stream in (text, image):  # the streams are no PreTrainedModels of their own, which would have set this
            stream._attn_implementation = stream._attn_implementation or self.config._attn_implementation
        paper = config.cross_form == "paper"
        # One row holds the text stream's embedding and, in the preserving form, the image stream's beside it.
        self.embed_tokens = nn.Embedding(config.vocab_size, sum(config.embedding_sizes), config.pad_token_id)
        stems = {
            "text_stem": make_stem(text, has_final_norm=True, has_positions=True),
            "image_stem": make_stem(image, has_final_norm=not paper, has_positions=not paper),
        }
        # A device map fills device after device in the order of registration.
        for name in (name for name, stem in stems.items() if stem.stands_first):
            self.add_module(name, stems[name])
        # trf-ignore: TRF034 (the four parts of a depth are checkpointing layers: its own would compute them twice)
        self.layers = nn.ModuleList([JamCrossDecoderLayer(config, depth) for depth in range(config.num_hidden_layers)])
        for name in (name for name, stem in stems.items() if not stem.stands_first):
            self.add_module(name, stems[name])
        self.output_projection = (
            JamOutputProjection(text.hidden_size + image.hidden_size, text.hidden_size, bias=False) if paper else None
        )
        self.text_sliding_index = sliding_cache_index(text, [layer.text_layer for layer in self.layers])
        self.image_sliding_index = sliding_cache_index(image, [layer.image_layer for layer in self.layers])
        self.gradient_checkpointing = False
        self.post_init()

    def stream_masks(self, stream: str, **kwargs: Any) -> dict[str, Any]:
        """The masks of one stream ("text", "image") by kind of attention; `kwargs` as in `create_causal_mask`."""
        config = self.config.text_config if stream == "text" else self.config.image_config
        sliding_index = self.text_sliding_index if stream == "text" else self.image_sliding_index
        return masks_by_type(config, sliding_index, **kwargs)

    def masks_for_generate(self, **kwargs: Any) -> torch.Tensor | dict[str, Any] | None:
        """Masks that `generate()` makes outside a compiled step, as `forward` takes them; `kwargs`: see `stream_masks`.

        One mask where one serves all attentions; otherwise one each under `{stream}_{kind of attention}`.
        """
        text, image = self.stream_masks("text", **kwargs), self.stream_masks("image", **kwargs)
        implementations = {config._attn_implementation for config in self.config.decoder_configs}
        if len(implementations) == len(text) == len(image) == 1:
            return text["full_attention"]
        streams = (("text", text), ("image", image))
        return {f"{stream}_{kind}": mask for stream, masks in streams for kind, mask in masks.items()}

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, Any] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> JamModelOutputWithPast:
        """See [`JamModel.forward`]; `inputs_embeds` is `[B, T, sum(config.embedding_sizes)]`.

        `attention_mask` may also be what `masks_for_generate` made.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        for name in self._can_record_outputs:  # for the recorders, not for the attention functions
            if name.startswith("image_"):
                kwargs.pop(f"output_{name}", None)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        if self.output_projection is None:
            text_embeds, image_embeds = inputs_embeds.split(self.config.embedding_sizes, dim=-1)
        else:
            text_embeds = image_embeds = inputs_embeds
        streams: list[Any] = []
        for stream, stem, embeds in (("text", self.text_stem, text_embeds), ("image", self.image_stem, image_embeds)):
            positions = position_ids
            if positions is None:
                positions = stem.position_ids(embeds, attention_mask, past_key_values)
            if stem is self.image_stem and self.output_projection is not None:
                embeds = streams[0][0]  # the paper's form: the same embedding plus position table feeds both [A]
            states = stem.embed(embeds, positions)
            if isinstance(attention_mask, dict):
                prefix = f"{stream}_"
                masks = {k.removeprefix(prefix): mask for k, mask in attention_mask.items() if k.startswith(prefix)}
            else:
                masks = self.stream_masks(
                    stream,
                    inputs_embeds=states,
                    attention_mask=attention_mask,
                    past_key_values=past_key_values,
                    position_ids=positions,
                )
            placed = {"position_ids": positions, **stem.layer_kwargs(states, positions)}
            streams.append((states, {kind: {"attention_mask": mask, **placed} for kind, mask in masks.items()}))
        (text_states, text_kwargs), (image_states, image_kwargs) = streams

        for layer in self.layers:
            text_states, image_states = layer(
                text_states,
                image_states,
                text_kwargs=text_kwargs,
                image_kwargs=image_kwargs,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )

        if self.output_projection is not None:
            # "Final states" are those of the last layers, before any norm; the LayerNorm is the text parent's [R].
            fused = self.text_stem.finish(self.output_projection(torch.cat((text_states, image_states), dim=-1)))
            return JamModelOutputWithPast(last_hidden_state=fused, past_key_values=past_key_values)
        return JamModelOutputWithPast(
            last_hidden_state=self.text_stem.finish(text_states),
            past_key_values=past_key_values,
            image_last_hidden_state=self.image_stem.finish(image_states),
        )


__all__ = ["JamCrossDecoder", "JamModelOutputWithPast", "JamPreTrainedModel"]
