"""How the weights of a JAM are split over processes: tables of names and of transformers' parallel styles.

They know names and head counts only; no module is built or touched here. transformers reads them through
`JamConfig.base_model_tp_plan`, and JamPreTrainedModel adapts them to the number of processes.
"""

from __future__ import annotations

from typing import Any


# Split by heads: each process computes its own heads, and `rowwise` sums what they add.
_BY_HEADS = {"query": "colwise", "key": "colwise", "value": "colwise", "output": "rowwise"}
# Weights are split all the same, but each process computes every head: for head counts that cannot be shared out evenly.
_WHOLE = dict.fromkeys(("query", "key", "value"), "colwise_gather_output") | {"output": "rowwise_split_input"}

_PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
_ATTENTION = {
    "llama": {role: f"self_attn.{name}" for role, name in _PROJECTIONS.items()},
    "opt": {role: f"self_attn.{name}" for role, name in (_PROJECTIONS | {"output": "out_proj"}).items()},
}
_FEED_FORWARD = {
    "llama": {"mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"},
    "opt": {"fc1": "colwise", "fc2": "rowwise"},
}
_CROSS_ATTENTION = {role: f"cross_attn.{name}" for role, name in _PROJECTIONS.items()}
_CROSS_FEED_FORWARD = _FEED_FORWARD | {"opt": {"mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"}}
# OPTAttention reshapes to all of its heads, whatever came: a slice of them would be read as a slice of the positions.
_SPLITS_HEADS = {"llama": True, "opt": False}


def splits_by_heads(config: Any, processes: int = 1) -> bool:
    """Whether the attentions of a JAM can be shared out by heads among so many processes.

    All are, or none: transformers sizes static caches by one rule for all layers.
    """
    return all(
        _SPLITS_HEADS[stream.model_type]
        and (getattr(stream, "num_key_value_heads", None) or stream.num_attention_heads) % processes == 0
        for stream in config.decoder_configs
    )


def tensor_parallel_plan(config: Any, processes: int = 1) -> dict[str, str]:
    """The names of a [`JamModel`]'s modules (`*` for the depth) -> transformers' tensor parallel styles.

    Query, key and value projections are split by heads, the output projection and the FFN accordingly; the embedding is split
    by the vocabulary, as a head tied to it must be. Norms, OPT's positions and projections, and the VQ model are whole in
    every process.
    """
    attention = _BY_HEADS if splits_by_heads(config, processes) else _WHOLE
    layers = "language_model.layers.*."
    plan = {"language_model.embed_tokens": "embedding_rowwise"}

    def add(prefix: str, names: dict[str, str], feed_forward: dict[str, str]) -> None:
        plan.update({f"{prefix}{name}": attention[role] for role, name in names.items()})
        plan.update({f"{prefix}{name}": style for name, style in feed_forward.items()})

    if config.fusion_mode != "cross":
        family = config.text_config.model_type
        add(layers, _ATTENTION[family], _FEED_FORWARD[family])
        return plan
    for stream, stream_config in (("text", config.text_config), ("image", config.image_config)):
        family = stream_config.model_type
        add(f"{layers}{stream}_layer.", _ATTENTION[family], _FEED_FORWARD[family])
        add(f"{layers}{stream}_cross.", _CROSS_ATTENTION, _CROSS_FEED_FORWARD[family])
    if config.cross_form == "paper":
        plan["language_model.output_projection"] = "colwise_gather_output"
    return plan


__all__ = ["splits_by_heads", "tensor_parallel_plan"]
