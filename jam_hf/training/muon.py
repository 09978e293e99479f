"""Muon for the matrices of a decoder, AdamW for all else, as one optimizer with one state (Jordan et al. 2024).

Muon (https://kellerjordan.github.io/posts/muon/) orthogonalises the momentum of a weight matrix before each step. In
the quickstart it needs about a third of AdamW's steps. `torch.optim.Muon` has the same update, in bfloat16 and matrix
by matrix, which costs most of the gain where bfloat16 is slow; here the products keep the dtype of the weights and
matrices of one shape go together. Which parameters it takes is said by `muon_parameter_groups`; it knows modules, not
what they model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic Newton-Schulz iteration, as in torch.optim.Muon
_CHUNK_ELEMENTS = 2**18  # of the matrices iterated on at once: 1 MiB in float32, which stays in a core's cache


def orthogonalise(matrices: torch.Tensor, steps: int = 3, eps: float = 1e-7) -> torch.Tensor:
    """Newton-Schulz iteration on `[S, A, B]` towards the nearest semi-orthogonal matrices, in their dtype.

    The coefficients trade exactness for speed: singular values end near 1 (0.7 to 1.2 after five steps), not at it.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class MuonAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` whose parameter groups with `muon=True` take Muon steps: every parameter in them is a matrix.

    Args:
        params: parameter groups, as from `muon_parameter_groups`; each with its own `lr`, which a scheduler may scale.
        momentum: of Muon, in Nesterov's form. newton_schulz_steps: iterations of `orthogonalise`.
        kwargs: of `torch.optim.AdamW`.
    Raises:
        ValueError: if a group with `muon=True` holds a parameter that is no matrix.
    """

    def __init__(self, params: Any, momentum: float = 0.95, newton_schulz_steps: int = 3, **kwargs: Any):
        super().__init__(params, **kwargs)
        for group in self.param_groups:
            group.setdefault("muon", False)
            group.setdefault("momentum", momentum)
            group.setdefault("newton_schulz_steps", newton_schulz_steps)
            wrong = [tuple(p.shape) for p in group["params"] if group["muon"] and p.ndim != 2]
            if wrong:
                raise ValueError(f"MuonAdamW: Muon steps are for matrices, got parameters of shapes {wrong[:3]}.")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        for group in groups:
            if group["muon"]:
                self._muon_step(group)
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        return loss

    def _muon_step(self, group: dict[str, Any]) -> None:
        by_shape: dict[Any, list[torch.Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape.setdefault((parameter.shape, parameter.device, parameter.dtype), []).append(parameter)
        for ((rows, columns), *_), parameters in by_shape.items():
            updates = []
            for parameter in parameters:
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)  # AdamW asks for it when a state is loaded
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                state["step"] += 1
                state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                updates.append(parameter.grad.lerp(state["momentum_buffer"], group["momentum"]))
            rate = group["lr"] * max(1.0, rows / columns) ** 0.5
            chunk = max(1, _CHUNK_ELEMENTS // (rows * columns))
            for start in range(0, len(parameters), chunk):
                directions = orthogonalise(torch.stack(updates[start : start + chunk]), group["newton_schulz_steps"])
                for parameter, direction in zip(parameters[start : start + chunk], directions):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(direction, alpha=-rate)


def muon_parameter_groups(
    model: nn.Module, muon_learning_rate: float, learning_rate: float, weight_decay: float
) -> list[dict]:
    """Trainable parameters as groups for `MuonAdamW`: matrices of linear layers, other matrices, and the rest.

    Output heads (`nn.Linear` modules whose name ends in "head") and embedding tables stay with AdamW: their rows are
    tokens, and most see no gradient in a batch. Vectors have no weight decay.
    """
    inside = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("head")
    }
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}  # tied heads as well
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if id(p) in inside and id(p) not in tables]
    taken = {id(p) for p in matrices}
    others = [p for p in trainable if id(p) not in taken and p.ndim >= 2]
    vectors = [p for p in trainable if p.ndim < 2]
    groups = [
        {"params": matrices, "lr": muon_learning_rate, "weight_decay": weight_decay, "muon": True},
        {"params": others, "lr": learning_rate, "weight_decay": weight_decay, "muon": False},
        {"params": vectors, "lr": learning_rate, "weight_decay": 0.0, "muon": False},
    ]
    return [group for group in groups if group["params"]]
