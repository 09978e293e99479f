"""How the weights of a JAM are split over processes: tables of names and of transformers' parallel styles.

They know names and head counts only; no module is built or touched here. transformers reads them through
`JamConfig.base_model_tp_plan`, and [`JamPreTrainedModel`] asks here when it is built and when it is split. There is no
pipeline
parallel plan: transformers' pipelines pass one hidden state from process to process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..model.families_jam import family_of, key_value_heads_of
from ..model.transformers_private_jam import replace_layer_number_by_wildcard


# Split by heads: each process computes its own heads, and `rowwise` sums what they add. A norm that all heads share
# (Qwen3) is whole, but its gradient is that of the process's own heads.
_BY_HEADS = dict.fromkeys(("query", "key", "value"), "colwise") | {
    "output": "rowwise",
    "norm of heads": "replicated_with_grad_allreduce",
}
# Weights are split all the same, but each process computes every head: for head counts that cannot be shared out
# evenly. The norm is named here to outvote the stock config's plan, which would add up gradients that are whole.
_WHOLE = dict.fromkeys(("query", "key", "value"), "colwise_gather_output") | {
    "output": "rowwise_split_input",
    "norm of heads": "replicate",
}

_CROSS_ATTENTION = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output"}
_PLAIN_FEED_FORWARD = {"mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"}  # JamFeedForward


def splits_by_heads(config: Any, processes: int = 1) -> bool:
    """Whether the attentions of a JAM can be shared out by heads among so many processes.

    All are, or none: transformers sizes static caches by one rule for all layers.
    """
    return all(
        not family_of(stream).counts_all_heads and key_value_heads_of(stream) % processes == 0
        for stream in config.decoder_configs
    )


def tensor_parallel_plan(config: Any, processes: int = 1) -> dict[str, str]:
    """The names of a [`JamModel`]'s modules (`*` for the depth) -> transformers' tensor parallel styles.

    Query, key and value projections are split by heads, the output projection and the FFN accordingly; the embedding is
    split by the vocabulary, as a head tied to it must be. Norms, OPT's positions and projections, and the VQ model are
    whole in every process.
    """
    styles = _BY_HEADS if splits_by_heads(config, processes) else _WHOLE
    layers = "language_model.layers.*."
    plan = {"language_model.embed_tokens": "embedding_rowwise"}

    def add(prefix: str, attention: str, names: Mapping[str, str], feed_forward: Mapping[str, str]) -> None:
        plan.update({f"{prefix}{attention}.{name}": styles[role] for name, role in names.items()})
        plan.update({f"{prefix}{name}": style for name, style in feed_forward.items()})

    if config.fusion_mode != "cross":
        family = family_of(config.text_config)
        add(layers, "self_attn", family.attention, family.feed_forward_split)
        return plan
    for stream, family in (("text", family_of(config.text_config)), ("image", family_of(config.image_config))):
        add(f"{layers}{stream}_layer.", "self_attn", family.attention, family.feed_forward_split)
        split = family.feed_forward_split if family.feed_forward is not None else _PLAIN_FEED_FORWARD
        add(f"{layers}{stream}_cross.", "cross_attn", _CROSS_ATTENTION, split)
    if config.cross_form == "paper":
        plan["language_model.output_projection"] = "colwise_gather_output"
    return plan


def parallel_plans(model: Any) -> tuple[dict[str, str], dict[str, str], dict[str, Any]]:
    """The plans of a model for tensors, FSDP2 and pipelines: of those that it has, the rules of parts that it has.

    Every config brings rules for the names of a plain decoder (`embed_tokens`, `layers.*`, `norm`); a JAM's parts have
    others.
    """
    names = {replace_layer_number_by_wildcard(name) for name, _ in model.named_modules()}
    tensors, units = (
        {name: style for name, style in plan.items() if name in names} for plan in (model.tp_plan, model.fsdp_plan)
    )
    if not isinstance(getattr(model, "image_head", None), nn.Linear):
        tensors.pop("image_head", None)  # an MLP is split by its layers, not as one
    return tensors, units, {}


def split_for(model: Any, distributed_config: Any) -> None:
    """Before a model is split: attentions whose heads the processes cannot share out evenly are computed whole in each.

    Raises:
        ValueError: if pipeline parallelism is asked for.
    """
    if distributed_config.pp_size > 1:
        raise ValueError(
            f"A JAM has no pipeline parallel plan (pp_size={distributed_config.pp_size} was asked for). To spread "
            "depths over devices use device_map='auto'; to split its weights use tp_size or fsdp_size."
        )
    if distributed_config.tp_size > 1:
        prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
        rules = tensor_parallel_plan(model.config, distributed_config.tp_size)
        model.tp_plan = {name: rules.get(name.removeprefix(prefix), style) for name, style in model.tp_plan.items()}


__all__ = ["parallel_plans", "split_for", "splits_by_heads", "tensor_parallel_plan"]
