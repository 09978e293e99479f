"""What trl's trainers ask of a causal LM, answered from a JAM's own logits.

trl (1.16, say) replaces the `forward` of the model it trains by one that multiplies `last_hidden_state` by
`lm_head.weight`
itself, and compares with the labels that it was given. In a JAM that would be wrong in silence: in the preserving cross
form image logits come from `image_head`, and placeholders in the labels become codes only inside `forward`. So a JAM
keeps trl's replacement (see `JamForCausalLM.__setattr__`), and answers its calls with `fused_lm_head=True` here. It
needs no trl. A JAM loaded from its folder's own code, without jam_hf, refuses the replacement.

Shape suffixes: B batch, T positions, V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import ModelOutput

from ..model.modeling_jam import is_trl_forward


@dataclass
class JamTokenStatistics(ModelOutput):
    """Statistics of each next-token label, under the names that trl gives them; `[B, T - 1]`, zero where the label is
    -100.

    Args:
        loss (`[]`): mean negative log-probability of the labels, over `num_items_in_batch` where that is given.
        log_probs, entropy, log_sum_sq_probs, mean_logits: of the distribution at `temperature`; only the first two have
            gradients. is_top1, label_mask (bool): whether the label is the likeliest id; whether there is a label.
    """

    loss: torch.FloatTensor | None = None
    log_probs: torch.FloatTensor | None = None
    entropy: torch.FloatTensor | None = None
    log_sum_sq_probs: torch.FloatTensor | None = None
    mean_logits: torch.FloatTensor | None = None
    is_top1: torch.BoolTensor | None = None
    label_mask: torch.BoolTensor | None = None
    aux_loss: torch.FloatTensor | None = None


def token_statistics(
    logits_BTV: torch.Tensor, labels_BT: torch.LongTensor, temperature: float = 1.0, num_items_in_batch: Any = None
) -> JamTokenStatistics:
    """Statistics of `labels` (int64 `[B, T]`, shifted here, -100 to ignore) under `logits` `[B, T, V]`."""
    logits = logits_BTV[:, :-1].float() / temperature
    labels = labels_BT[:, 1:].to(logits.device)
    mask = labels != -100
    log_probs_V = logits.log_softmax(-1)
    log_probs = log_probs_V.gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(~mask, 0.0)
    entropy = -(log_probs_V.exp() * log_probs_V).sum(-1).masked_fill(~mask, 0.0)
    count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    with torch.no_grad():
        log_sum_sq_probs = (2 * log_probs_V).logsumexp(-1).masked_fill(~mask, 0.0)
        mean_logits = logits.mean(-1).masked_fill(~mask, 0.0)
    return JamTokenStatistics(
        loss=-log_probs.sum() / count,
        log_probs=log_probs,
        entropy=entropy,
        log_sum_sq_probs=log_sum_sq_probs,
        mean_logits=mean_logits,
        is_top1=(log_probs_V.argmax(-1) == labels) & mask,
        label_mask=mask,
    )


def answering_trl(model: nn.Module, trl_forward: Callable[..., Any]) -> MethodType:
    """trl's `forward`, but for calls with `fused_lm_head=True`, which are answered from the JAM's own logits.

    The temperature is the one that trl's function was made with.
    """
    temperature = inspect.getclosurevars(inspect.unwrap(trl_forward, stop=is_trl_forward)).nonlocals.get(
        "temperature", 1.0
    )

    @functools.wraps(type(model).forward)
    def forward(
        self: Any,
        input_ids: torch.Tensor | None = None,
        *args: Any,
        fused_lm_head: bool = False,
        labels: torch.Tensor | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            given = {"labels": labels, "num_items_in_batch": num_items_in_batch}
            given = {name: value for name, value in given.items() if value is not None}
            return trl_forward(input_ids, *args, **given, **kwargs)
        if kwargs.get("shift_labels") is not None:
            raise ValueError(
                "A JAM takes `labels`, not `shift_labels` (context or sequence parallelism is not supported)."
            )
        input_ids, labels = self.encode_pictures(input_ids, labels, kwargs.pop("pixel_values", None))
        outputs = trl_forward(input_ids, *args, **{**kwargs, "use_cache": False, "return_dict": True})
        return token_statistics(outputs.logits, labels, temperature, num_items_in_batch)

    return MethodType(forward, model)


__all__ = ["JamTokenStatistics", "answering_trl", "is_trl_forward", "token_statistics"]
