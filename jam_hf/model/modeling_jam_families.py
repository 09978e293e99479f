# Licensed under the Apache License, Version 2.0.
"""The modules that a JAM takes from each stock transformers decoder: layers and what surrounds them, norms, FFNs.

What differs between families is read off their fact sheets (families_jam.py). How two streams are mixed is not known
here (modeling_jam_cross.py).

Shape suffixes: B batch, T new positions, D hidden size, E embedding size (= D but for OPT's `word_embed_proj_dim`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from .families_jam import attention_type, family_of


class JamFeedForward(nn.Module):
    """`down_proj(act(up_proj(x)))` without biases: OPT's FFN, which transformers has only inside OPTDecoderLayer."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str):
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = ACT2FN[activation]

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_BTD)))


class RotaryStem(nn.Module):
    """What a decoder with rotary positions does before its first and after its last layer, under its own names."""

    # Whether its weights stand before the layers, as in the stock decoder; a device map goes by that order.
    stands_first = False

    def __init__(self, config: PreTrainedConfig, has_final_norm: bool, has_positions: bool):
        super().__init__()
        family = family_of(config)
        self.rotary_emb = family.class_of(family.rotary)(config=config)
        self.norm = make_norm(config) if has_final_norm else None

    def position_ids(self, inputs_embeds: torch.Tensor, attention_mask: Any, past_key_values: Any) -> torch.LongTensor:
        """`[1, T]`: counted from the start of the row, as the stock decoders do."""
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        return (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past).unsqueeze(0)

    def embed(self, inputs_embeds_BTE: torch.Tensor, position_ids: torch.LongTensor) -> torch.Tensor:
        return inputs_embeds_BTE

    def layer_kwargs(self, hidden_BTD: torch.Tensor, position_ids: torch.LongTensor) -> dict[str, Any]:
        return {"position_embeddings": self.rotary_emb(hidden_BTD, position_ids=position_ids)}

    def finish(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden_BTD)


class OPTStem(nn.Module):
    """What an OPT decoder does before its first and after its last layer, under OPT's own parameter names."""

    stands_first = True

    def __init__(self, config: PreTrainedConfig, has_final_norm: bool, has_positions: bool):
        super().__init__()
        self.embed_positions = None
        self.project_in = self.project_out = self.final_layer_norm = None
        projected = config.word_embed_proj_dim != config.hidden_size
        if has_positions:
            table = family_of(config).class_of("LearnedPositionalEmbedding")
            self.embed_positions = table(config.max_position_embeddings, config.hidden_size)
            if projected:
                self.project_in = nn.Linear(config.word_embed_proj_dim, config.hidden_size, bias=False)
        if has_final_norm:
            # CODEPATH: OPT-350M norms after its layers; all other OPTs before them, and once more at the end.
            if config.do_layer_norm_before and not config._remove_final_layer_norm:
                self.final_layer_norm = nn.LayerNorm(
                    config.hidden_size, elementwise_affine=config.layer_norm_elementwise_affine
                )
            if projected:
                self.project_out = nn.Linear(config.hidden_size, config.word_embed_proj_dim, bias=False)

    def position_ids(self, inputs_embeds: torch.Tensor, attention_mask: Any, past_key_values: Any) -> torch.LongTensor:
        """`[B or 1, T]`: counted over the attended positions of the 2D mask, as OPTDecoder does (padding is -1)."""
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
            return (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past).unsqueeze(0)
        position_ids = (torch.cumsum(attention_mask, dim=1) * attention_mask - 1).long()
        # Indexed, not sliced: the length of a static cache is a tensor, which a compiled graph must not read.
        return position_ids[:, torch.arange(inputs_embeds.shape[1], device=position_ids.device) + past]

    def embed(self, inputs_embeds_BTE: torch.Tensor, position_ids: torch.LongTensor) -> torch.Tensor:
        if self.embed_positions is None:  # the paper's form: the text stream's embedding, with positions, feeds both
            return inputs_embeds_BTE
        hidden_BTD = inputs_embeds_BTE if self.project_in is None else self.project_in(inputs_embeds_BTE)
        return hidden_BTD + self.embed_positions(None, 0, position_ids=position_ids).to(hidden_BTD.device)

    def layer_kwargs(self, hidden_BTD: torch.Tensor, position_ids: torch.LongTensor) -> dict[str, Any]:
        return {}

    def finish(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        if self.final_layer_norm is not None:
            hidden_BTD = self.final_layer_norm(hidden_BTD)
        return hidden_BTD if self.project_out is None else self.project_out(hidden_BTD)


def make_stem(config: PreTrainedConfig, has_final_norm: bool, has_positions: bool) -> RotaryStem | OPTStem:
    """What surrounds the layers of a stream."""
    stem_class = OPTStem if family_of(config).learned_positions else RotaryStem
    return stem_class(config, has_final_norm, has_positions)


def make_layer(config: PreTrainedConfig, depth: int, cache_index: int) -> nn.Module:
    """The stock layer of this depth; its attention is the `cache_index`-th of the JAM's cache."""
    family = family_of(config)
    # CODEPATH: Chameleon-30B has swin norms, Chameleon-7B and the other families have none.
    role = family.swin_layer if family.swin_layer is not None and config.swin_norm else family.layer
    layer = family.class_of(role)(config, layer_idx=depth)  # the stock layer looks up by its depth whether it slides
    layer.self_attn.layer_idx = cache_index
    return layer


def make_norm(config: PreTrainedConfig) -> nn.Module:
    """The family's norm over the hidden size."""
    family = family_of(config)
    if family.norm is None:
        return nn.LayerNorm(config.hidden_size, elementwise_affine=config.layer_norm_elementwise_affine, bias=False)
    return family.class_of(family.norm)(config.hidden_size, eps=config.rms_norm_eps)


def make_feed_forward(config: PreTrainedConfig) -> nn.Module:
    """The family's FFN as a cross block has it, without biases."""
    family = family_of(config)
    if family.feed_forward is None:
        return JamFeedForward(config.hidden_size, config.ffn_dim, config.activation_function)
    feed_forward = family.class_of(family.feed_forward)(config)
    for projection in feed_forward.children():
        if isinstance(projection, nn.Linear):
            projection.bias = None  # whatever the parent's `mlp_bias`
    return feed_forward


def sliding_cache_index(config: PreTrainedConfig, layers: list[nn.Module | None]) -> int | None:
    """Where the first of a stream's `layers` that slides stands in the JAM's cache; None where none slides."""
    for depth, layer in enumerate(layer for layer in layers if layer is not None):
        if attention_type(config, depth) == "sliding_attention":
            return layer.self_attn.layer_idx
    return None


def masks_by_type(config: PreTrainedConfig, sliding_index: int | None, **kwargs: Any) -> dict[str, Any]:
    """The masks of one stream by transformers' names for kinds of attention; `kwargs` as in `create_causal_mask`.

    There is always one for full attention: cross blocks see the whole past. `sliding_index`, see `sliding_cache_index`:
    the cache of a layer that slides is shorter, and the other stream's window may have another size.
    """
    masks = {"full_attention": create_causal_mask(config=config, **kwargs)}
    if sliding_index is not None:
        masks["sliding_attention"] = create_sliding_window_causal_mask(config=config, layer_idx=sliding_index, **kwargs)
    return masks


def states_of(output: Any) -> torch.Tensor:
    """The hidden states that a stock layer returned: alone, or first in a tuple (Chameleon)."""
    return output[0] if isinstance(output, tuple) else output
