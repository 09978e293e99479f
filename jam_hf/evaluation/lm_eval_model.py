"""A JAM for lm_eval (the harness), with image codes in or out of the softmax, as `certify` has it.

from jam_hf.evaluation.lm_eval_model import harness_model

lm_eval.simple_evaluate(model=harness_model(model, processor.tokenizer), tasks=["hellaswag"])
"""

from __future__ import annotations

from typing import Any

import torch


SOFTMAX = ("text", "all")


def check_softmax(softmax: str) -> None:
    """Raises a `ValueError` where it is none of `SOFTMAX`."""
    if softmax not in SOFTMAX:
        raise ValueError(
            f"softmax must be 'text' (image codes left out, as in generation_mode='text') or 'all'; got {softmax!r}."
        )


def harness_model(model: Any, tokenizer: Any, softmax: str = "text", **kwargs: Any) -> Any:
    """A [`JamForCausalLM`] as lm_eval's `HFLM`; `kwargs` are `HFLM`'s.

    Args:
        softmax: "text": probabilities among the ids of text, image codes having none, as `certify` counts and as
            documents are written in `generation_mode="text"`. "all": among all ids, as lm_eval's own `model="hf"` has
            it.
    """
    from lm_eval.models.huggingface import HFLM

    check_softmax(softmax)
    codes = slice(model.config.image_token_range.start, model.config.image_token_range.stop)

    class JamHarness(HFLM):
        def _model_call(self, *args: Any, **call: Any) -> torch.Tensor:
            logits = super()._model_call(*args, **call)
            if softmax == "text":
                logits = logits.clone()
                logits[..., codes] = float("-inf")
            return logits

    return JamHarness(pretrained=model, tokenizer=tokenizer, **kwargs)


__all__ = ["SOFTMAX", "check_softmax", "harness_model"]
