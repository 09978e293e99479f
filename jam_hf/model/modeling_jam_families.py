"""The registry of decoder families: what JAM takes from each stock transformers decoder, and what differs between them.

It knows the stock modules and their names; it does not know how two streams are mixed (modeling_jam_cross.py). A family is
added here and to `SUPPORTED_FAMILIES`; nothing is guessed from a config by duck typing.

Shape suffixes: B batch, T new positions, D hidden size, E embedding size (= D but for OPT's `word_embed_proj_dim`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, LlamaModel, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.opt.modeling_opt import OPTDecoder, OPTDecoderLayer, OPTLearnedPositionalEmbedding


class JamFeedForward(nn.Module):
    """`down_proj(act(up_proj(x)))` without biases: OPT's FFN, which transformers has only inside OPTDecoderLayer."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str):
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = ACT2FN[activation]

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_BTD)))


class LlamaStem(nn.Module):
    """What a Llama decoder does before its first and after its last layer, under Llama's own parameter names."""

    def __init__(self, config: PreTrainedConfig, has_final_norm: bool, has_positions: bool):
        super().__init__()
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps) if has_final_norm else None

    def position_ids(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, past_key_values: Cache | None
    ) -> torch.LongTensor:
        """`[1, T]`: counted from the start of the row, as LlamaModel does."""
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

    def __init__(self, config: PreTrainedConfig, has_final_norm: bool, has_positions: bool):
        super().__init__()
        self.embed_positions = None
        self.project_in = self.project_out = self.final_layer_norm = None
        projected = config.word_embed_proj_dim != config.hidden_size
        if has_positions:
            self.embed_positions = OPTLearnedPositionalEmbedding(config.max_position_embeddings, config.hidden_size)
            if projected:
                self.project_in = nn.Linear(config.word_embed_proj_dim, config.hidden_size, bias=False)
        if has_final_norm:
            if config.do_layer_norm_before and not config._remove_final_layer_norm:
                self.final_layer_norm = nn.LayerNorm(
                    config.hidden_size, elementwise_affine=config.layer_norm_elementwise_affine
                )
            if projected:
                self.project_out = nn.Linear(config.hidden_size, config.word_embed_proj_dim, bias=False)

    def position_ids(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, past_key_values: Cache | None
    ) -> torch.LongTensor:
        """`[B or 1, T]`: counted over the attended positions of the 2D mask, as OPTDecoder does (padding is -1)."""
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if attention_mask is None or attention_mask.dim() != 2:
            return (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past).unsqueeze(0)
        position_ids = (torch.cumsum(attention_mask, dim=1) * attention_mask - 1).long()
        # Indexed, not sliced: the length of a static cache is a tensor, which a compiled graph must not read.
        return position_ids[:, torch.arange(inputs_embeds.shape[1], device=position_ids.device) + past]

    def embed(self, inputs_embeds_BTE: torch.Tensor, position_ids: torch.LongTensor) -> torch.Tensor:
        if self.embed_positions is None:  # the paper's form: the text stream's embedding, positions included, feeds both
            return inputs_embeds_BTE
        hidden_BTD = inputs_embeds_BTE if self.project_in is None else self.project_in(inputs_embeds_BTE)
        return hidden_BTD + self.embed_positions(None, 0, position_ids=position_ids).to(hidden_BTD.device)

    def layer_kwargs(self, hidden_BTD: torch.Tensor, position_ids: torch.LongTensor) -> dict[str, Any]:
        return {}

    def finish(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        if self.final_layer_norm is not None:
            hidden_BTD = self.final_layer_norm(hidden_BTD)
        return hidden_BTD if self.project_out is None else self.project_out(hidden_BTD)


@dataclass(frozen=True)
class Family:
    """Stock classes of one family.

    decoder: the whole decoder (uniform, width). layer: one layer of it (cross). stem: what surrounds the layers (cross).
    norm, feed_forward: makers of a norm and of a bias-free FFN of the family, for the cross blocks.
    decoder_path: where the decoder sits in a checkpoint of the parent's causal LM.
    stem_first: whether the stem's weights stand before the layers or behind them, as in the stock decoder; a device map goes
        by that order.
    """

    decoder: type
    layer: type
    stem: type
    decoder_path: str
    stem_first: bool

    def norm(self, config: PreTrainedConfig) -> nn.Module:
        if self is FAMILIES["llama"]:
            return LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        return nn.LayerNorm(config.hidden_size, elementwise_affine=config.layer_norm_elementwise_affine, bias=False)

    def feed_forward(self, config: PreTrainedConfig) -> nn.Module:
        if self is FAMILIES["opt"]:
            return JamFeedForward(config.hidden_size, config.ffn_dim, config.activation_function)
        feed_forward = LlamaMLP(config)
        for projection in (feed_forward.gate_proj, feed_forward.up_proj, feed_forward.down_proj):
            projection.bias = None  # cross blocks have no biases, whatever the parent's `mlp_bias`
        return feed_forward


FAMILIES: dict[str, Family] = {
    "llama": Family(LlamaModel, LlamaDecoderLayer, LlamaStem, "model.", stem_first=False),
    "opt": Family(OPTDecoder, OPTDecoderLayer, OPTStem, "model.decoder.", stem_first=True),
}


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a decoder's config. Raises `ValueError` for one that is not registered."""
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"JAM does not support decoders of the family '{config.model_type}'; supported: {', '.join(FAMILIES)}."
        )
    return FAMILIES[config.model_type]
