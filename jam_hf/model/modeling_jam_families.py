# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with the
# License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific
# language governing permissions and limitations under the License.
"""The registry of decoder families: what JAM takes from each stock transformers decoder, and what differs between them.

It knows the stock modules and their names; it does not know how two streams are mixed (modeling_jam_cross.py). A family is
added here, to `SUPPORTED_FAMILIES` (and what stands beside it) and to the plans of sharding_jam.py; nothing is guessed from a
config by duck typing.

Shape suffixes: B batch, T new positions, D hidden size, E embedding size (= D but for OPT's `word_embed_proj_dim`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, LlamaModel, MistralModel, PreTrainedConfig, Qwen2Model, Qwen3Model
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.chameleon.modeling_chameleon import (
    ChameleonDecoderLayer,
    ChameleonMLP,
    ChameleonRMSNorm,
    ChameleonRotaryEmbedding,
    ChameleonSwinDecoderLayer,
)
from transformers.models.emu3.modeling_emu3 import (
    Emu3DecoderLayer,
    Emu3MLP,
    Emu3RMSNorm,
    Emu3RotaryEmbedding,
    Emu3TextModel,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import (
    MistralDecoderLayer,
    MistralMLP,
    MistralRMSNorm,
    MistralRotaryEmbedding,
)
from transformers.models.opt.modeling_opt import OPTDecoder, OPTDecoderLayer, OPTLearnedPositionalEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2MLP, Qwen2RMSNorm, Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3MLP, Qwen3RMSNorm, Qwen3RotaryEmbedding

from .configuration_jam import attention_type


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
    """What a decoder with rotary positions does before its first and after its last layer, under the family's own names."""

    def __init__(self, config: PreTrainedConfig, has_final_norm: bool, has_positions: bool):
        super().__init__()
        family = family_of(config)
        self.rotary_emb = family.rotary(config=config)
        self.norm = family.norm(config) if has_final_norm else None

    def position_ids(self, inputs_embeds: torch.Tensor, attention_mask: Any, past_key_values: Cache | None) -> torch.LongTensor:
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
            # CODEPATH: OPT-350M norms after its layers; all other OPTs before them, and once more at the end.
            if config.do_layer_norm_before and not config._remove_final_layer_norm:
                self.final_layer_norm = nn.LayerNorm(
                    config.hidden_size, elementwise_affine=config.layer_norm_elementwise_affine
                )
            if projected:
                self.project_out = nn.Linear(config.hidden_size, config.word_embed_proj_dim, bias=False)

    def position_ids(self, inputs_embeds: torch.Tensor, attention_mask: Any, past_key_values: Cache | None) -> torch.LongTensor:
        """`[B or 1, T]`: counted over the attended positions of the 2D mask, as OPTDecoder does (padding is -1)."""
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
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

    decoder: the whole decoder (uniform, width); None where transformers has none by itself. layer: one layer of it (cross).
    swin_layer: the same where the config says `swin_norm`. stem: what surrounds the layers (cross). rotary: its rotary
        embedding. norm_class, feed_forward_class: the classes behind `norm` and `feed_forward`; None: OPT's, which has neither.
    decoder_path: where the decoder sits in a checkpoint of the parent's causal LM.
    stem_first: whether the stem's weights stand before the layers or behind them, as in the stock decoder; a device map goes
        by that order.
    """

    decoder: type | None
    layer: type
    stem: type
    decoder_path: str
    stem_first: bool
    rotary: type | None = None
    norm_class: type | None = None
    feed_forward_class: type | None = None
    swin_layer: type | None = None

    def make_layer(self, config: PreTrainedConfig, depth: int, cache_index: int) -> nn.Module:
        """The stock layer of this depth; its attention is the `cache_index`-th of the JAM's cache."""
        # CODEPATH: Chameleon-30B has swin norms, Chameleon-7B and the other families have none.
        layer_class = self.swin_layer if self.swin_layer is not None and config.swin_norm else self.layer
        layer = layer_class(config, layer_idx=depth)  # the stock layer looks up by its depth whether it slides
        layer.self_attn.layer_idx = cache_index
        return layer

    def norm(self, config: PreTrainedConfig) -> nn.Module:
        if self.norm_class is None:
            return nn.LayerNorm(config.hidden_size, elementwise_affine=config.layer_norm_elementwise_affine, bias=False)
        return self.norm_class(config.hidden_size, eps=config.rms_norm_eps)

    def feed_forward(self, config: PreTrainedConfig) -> nn.Module:
        if self.feed_forward_class is None:
            return JamFeedForward(config.hidden_size, config.ffn_dim, config.activation_function)
        feed_forward = self.feed_forward_class(config)
        for projection in (feed_forward.gate_proj, feed_forward.up_proj, feed_forward.down_proj):
            projection.bias = None  # cross blocks have no biases, whatever the parent's `mlp_bias`
        return feed_forward


def _rotary_family(
    decoder: type | None, layer: type, rotary: type, norm: type, feed_forward: type, swin_layer: type | None = None
) -> Family:
    return Family(
        decoder=decoder,
        layer=layer,
        stem=RotaryStem,
        decoder_path="model.",
        stem_first=False,
        rotary=rotary,
        norm_class=norm,
        feed_forward_class=feed_forward,
        swin_layer=swin_layer,
    )


FAMILIES: dict[str, Family] = {
    "llama": _rotary_family(LlamaModel, LlamaDecoderLayer, LlamaRotaryEmbedding, LlamaRMSNorm, LlamaMLP),
    "mistral": _rotary_family(MistralModel, MistralDecoderLayer, MistralRotaryEmbedding, MistralRMSNorm, MistralMLP),
    "qwen2": _rotary_family(Qwen2Model, Qwen2DecoderLayer, Qwen2RotaryEmbedding, Qwen2RMSNorm, Qwen2MLP),
    "qwen3": _rotary_family(Qwen3Model, Qwen3DecoderLayer, Qwen3RotaryEmbedding, Qwen3RMSNorm, Qwen3MLP),
    "opt": Family(OPTDecoder, OPTDecoderLayer, OPTStem, "model.decoder.", stem_first=True),
    "chameleon": _rotary_family(
        None,  # ChameleonModel has the decoder's modules, and a VQ model of its own among them
        ChameleonDecoderLayer,
        ChameleonRotaryEmbedding,
        ChameleonRMSNorm,
        ChameleonMLP,
        swin_layer=ChameleonSwinDecoderLayer,
    ),
    "emu3_text_model": _rotary_family(Emu3TextModel, Emu3DecoderLayer, Emu3RotaryEmbedding, Emu3RMSNorm, Emu3MLP),
}


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a decoder's config. Raises `ValueError` for one that is not registered."""
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"JAM does not support decoders of the family '{config.model_type}'; supported: {', '.join(FAMILIES)}."
        )
    return FAMILIES[config.model_type]


def sliding_cache_index(config: PreTrainedConfig, layers: list[nn.Module]) -> int | None:
    """Where the first of a stream's `layers` that slides stands in the JAM's cache; None where none slides."""
    indices = [
        layer.self_attn.layer_idx for depth, layer in enumerate(layers) if attention_type(config, depth) == "sliding_attention"
    ]
    return indices[0] if indices else None


def masks_by_type(config: PreTrainedConfig, sliding_index: int | None, **kwargs: Any) -> dict[str, Any]:
    """The masks of one stream by transformers' names for kinds of attention; `kwargs` as in `create_causal_mask`.

    There is always one for full attention: cross blocks see the whole past. `sliding_index`, see `sliding_cache_index`: the
    cache of a layer that slides is shorter, and the other stream's window may have another size.
    """
    masks = {"full_attention": create_causal_mask(config=config, **kwargs)}
    if sliding_index is not None:
        masks["sliding_attention"] = create_sliding_window_causal_mask(config=config, layer_idx=sliding_index, **kwargs)
    return masks


def states_of(output: Any) -> torch.Tensor:
    """The hidden states that a stock layer returned: alone, or first in a tuple (Chameleon)."""
    return output[0] if isinstance(output, tuple) else output
