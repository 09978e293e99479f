"""What transformers' Trainer does with labels outside of a model's `forward`, made right for a JAM.

A Trainer takes the labels away before `forward` for label smoothing and for `compute_loss_func`, and hands them to
`compute_metrics`; trl's preference losses take `input_ids` themselves for labels. There the placeholders `<image>`
would stand where codes belong. And it shifts labels for smoothing only where it finds the *name* of the class in a
static table, which it does not once a wrapper (FSDP2, `torch.compile`) or a subclass has another. So a Trainer that
trains a JAM gets codes in ids and labels as soon as the batch is on its device, and a smoother that shifts. What trl's
GRPO and RLOO pass through there are prompts, which keep their pixels. It imports no Trainer: where there is none,
nothing is changed, and for other models nothing is either.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method


def jam_inside(model: nn.Module) -> nn.Module | None:
    """The JAM that a Trainer's model is, or holds under peft or `torch.compile`; None of another model."""
    model = getattr(model, "_orig_mod", model)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return model if hasattr(model, "encode_pictures") else None


def with_codes(model: nn.Module, jam: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A batch with the codes of its `pixel_values` in `input_ids` and `labels`, and without `pixel_values`.

    Args:
        model: what the Trainer trains: `jam`, or what wraps it.
        inputs: a dict, or what processors return (`BatchFeature`, which is none).
    Raises:
        ValueError: if placeholders and pictures do not match, or a placeholder would be learned.
    """
    caller = jam
    if isinstance(model, FSDPModule):  # its weights come together around the calls that FSDP2 knows of
        caller = model
        if "encode_pictures" not in vars(model):
            register_fsdp_forward_method(model, "encode_pictures")
    with torch.no_grad():
        ids, labels = caller.encode_pictures(inputs["input_ids"], inputs.get("labels"), inputs.get("pixel_values"))
        beside = {  # the same prompts once more: trl's KTO, beside other answers (`KL_input_ids`)
            name: caller.encode_pictures(value, None, inputs["pixel_values"])[0]
            for name, value in inputs.items()
            if name.endswith("_input_ids")
            and "pixel_values" in inputs
            and bool((value == jam.config.image_token_id).any())
        }
    inputs = {name: value for name, value in inputs.items() if name != "pixel_values"} | {"input_ids": ids} | beside
    return inputs if labels is None else inputs | {"labels": labels}


def teach_trainers() -> None:
    """Make `Trainer._prepare_inputs` put codes into the batches of JAMs; once, and only where a Trainer is imported."""
    trainer = sys.modules.get("transformers.trainer")
    if trainer is None or hasattr(trainer.Trainer._prepare_inputs, "gives_jam_codes"):
        return
    stock = trainer.Trainer._prepare_inputs

    @functools.wraps(stock)
    def _prepare_inputs(self: Any, raw: Any) -> Any:
        inputs = stock(self, raw)
        jam = jam_inside(self.model)
        if jam is None:
            return inputs
        if isinstance(self.label_smoother, trainer.LabelSmoother):
            self.label_smoother = functools.partial(self.label_smoother, shift_labels=True)
        given = isinstance(inputs, Mapping) and inputs.get("input_ids") is not None
        # Trainers that write what they learn from (trl's GRPO, RLOO) pass prompts through here, and need pixels again.
        overridden = type(self)._prepare_inputs is not _prepare_inputs
        if not given or (overridden and not {"labels", "completion_mask"} & set(inputs)):
            return inputs
        inputs = with_codes(self.model, jam, inputs)
        if "inputs" in self.args.include_for_metrics and isinstance(raw, MutableMapping):
            raw["input_ids"] = inputs["input_ids"]  # `EvalPrediction.inputs` is read from the batch as it came
            raw.pop("pixel_values", None)
        return inputs

    _prepare_inputs.gives_jam_codes = True  # type: ignore[attr-defined]
    trainer.Trainer._prepare_inputs = _prepare_inputs


__all__ = ["jam_inside", "teach_trainers", "with_codes"]
