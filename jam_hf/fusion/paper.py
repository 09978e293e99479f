"""The models of the paper (arXiv 2309.15564) as configs, for their sizes; their weights are not public."""

from __future__ import annotations

import copy
from typing import Any

from transformers import OPTConfig

from ..model.configuration_jam import JamConfig


def paper(config_class: type[JamConfig], fusion_mode: str = "cross", **kwargs: Any) -> JamConfig:
    """`JamConfig.paper`: the paper's 7B parents, fused: about 7B ("uniform"), 26B ("width") or 19B ("cross")
    parameters.

    Parents: 32 layers, hidden size 4096, 32 heads, FFN 4 x 4096, 4096 learned positions, no biases, no LayerNorm
    parameters, no dropout (CM3leon, arXiv 2309.02591); vocabulary 56,320 + 8,192 image codes. Width doubles hidden
    size, heads (64) and FFN. GELU, and the tying of input and output embeddings (which the counts suggest), are our
    reconstruction.

    Raises:
        ValueError: on another fusion mode, and what [`JamConfig`] raises.
    """
    scale = 2 if fusion_mode == "width" else 1
    codes, text_vocab = 8192, 56320
    parent = OPTConfig(
        vocab_size=text_vocab + codes,
        hidden_size=4096 * scale,
        ffn_dim=4 * 4096 * scale,
        num_attention_heads=32 * scale,
        num_hidden_layers=32,
        max_position_embeddings=4096,
        enable_bias=False,
        layer_norm_elementwise_affine=False,
        dropout=0.0,
        activation_function="gelu",
        init_std=0.006,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    settings: dict[str, Any] = {
        "fusion_mode": fusion_mode,
        "text_config": parent,
        "image_config": copy.deepcopy(parent) if fusion_mode == "cross" else None,
        "cross_form": "paper",
        "cross_attention_interval": 2,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "break_token_id": 3,
        "image_token_id": 4,
        "mask_token_id": 5,
        "num_mask_tokens": 512,
        "image_token_offset": text_vocab,
        "tie_word_embeddings": True,
    }
    return config_class(**{**settings, **kwargs})


__all__ = ["paper"]
