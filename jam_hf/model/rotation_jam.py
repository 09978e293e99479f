"""Rotary positions that depend on the length of a sequence (`longrope`, `dynamic`), and who may share a forward then.

transformers rotates all that a forward feeds by the longest position in it: `longrope` by one of two sets of
frequencies, `dynamic` beyond the trained positions by another set at each length. A sequence in one forward with a
longer one is rotated otherwise than alone. Whatever puts sequences together asks here. It knows configs and the state
of transformers' modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


def rotation(configs: Sequence[Any], length: int) -> tuple[int, ...]:
    """Sequences with equal ones may share a forward and a cache; empty where no decoder goes by the length.

    Args:
        configs: of the decoders. length: of the sequence, in positions.
    """
    found = []
    for config in configs:
        parameters = getattr(config, "rope_parameters", None) or {}
        kind = parameters.get("rope_type", "default")
        if kind == "longrope":
            found.append(int(length > parameters["original_max_position_embeddings"]))
        elif "dynamic" in kind:
            found.append(max(length, config.max_position_embeddings))
    return tuple(found)


def one_rotation(configs: Sequence[Any], longest: int) -> bool:
    """Whether all sequences of up to `longest` positions may share a forward."""
    return rotation(configs, longest) == rotation(configs, 1)


@contextmanager
def rotated_alone(model: torch.nn.Module) -> Iterator[None]:
    """Forwards inside are rotated by their own lengths, not by what `dynamic` modules remember of longer ones; behind
    it the modules remember what they did before."""
    remembered = []
    for module in model.modules():
        if "dynamic" in str(getattr(module, "rope_type", "")) and hasattr(module, "original_inv_freq"):
            remembered.append((module, module.inv_freq, module.max_seq_len_cached, module.attention_scaling))
            module.inv_freq, module.max_seq_len_cached = module.original_inv_freq, module.original_max_seq_len
    try:
        yield
    finally:
        for module, *state in remembered:
            module.inv_freq, module.max_seq_len_cached, module.attention_scaling = state


__all__ = ["one_rotation", "rotated_alone", "rotation"]
