"""What a training run began with, in a few words each: settings, data, objective and starting model.

A run that was interrupted goes on only with the same. It trains nothing, and reads what it is given once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from ..data.collator import JamDataCollator


def of_documents(dataset: Dataset, column: str = "input_ids") -> str:
    """Digest of all documents and their order, however the rows are stored (chunks, integer types, indices)."""
    digest = hashlib.blake2b(digest_size=16)
    for batch in dataset.select_columns(column).with_format("numpy").iter(batch_size=1000):
        rows = [np.asarray(ids).astype("<i8") for ids in batch[column]]
        digest.update(np.array([len(ids) for ids in rows], dtype="<i8").tobytes())
        digest.update(np.concatenate(rows).tobytes() if rows else b"")
    return digest.hexdigest()


def of_tensors(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Digest of names, shapes, types and every value; of a tensor in shards, those of this process."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in named:
        tensor = tensor.detach()
        tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        if tensor.device.type != "meta":
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def of_run(model: nn.Module, dataset: Dataset, collator: JamDataCollator, processes: int) -> dict[str, Any]:
    """What decides what is learned, beside the settings: `{"collator.cm3.mean_spans": 1.0, "documents": ..., ...}`.

    Args:
        model: as it starts; which of its parameters are trained counts as well.
        processes: how many share the batches.
    """
    found: dict[str, Any] = {}
    for name, value in asdict(collator).items():
        if isinstance(value, dict):  # of CM3; tuples as JSON has them
            found |= {f"collator.{name}.{k}": list(v) if isinstance(v, tuple) else v for k, v in value.items()}
        else:
            found[f"collator.{name}"] = value
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return found | {
        "documents": of_documents(dataset),
        "starting model": of_tensors(sorted(model.state_dict().items())),
        "trained parameters": hashlib.blake2b("\n".join(trained).encode(), digest_size=16).hexdigest(),
        "processes": processes,
    }
