"""Batches for training: the CM3 objective on the fly, padding, and labels - the one path by which labels are made.

It knows ids, not models. Every token but padding is a label, image codes included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .cm3 import CM3Settings, cm3


@dataclass
class JamDataCollator:
    """Collate `{"input_ids": [...]}` into `input_ids`, `attention_mask` and `labels`, int64 `[B, T]`, padded on the right.

    Args:
        pad_token_id: id of the padding; its labels are -100.
        vocab_size: ids outside `[0, vocab_size)` are refused.
        cm3: settings of the CM3 objective; `None`: plain causal documents.
        max_length: longer documents raise a `ValueError` (they are never cut in silence); CM3 cuts as [M] says.
        pad_to_multiple_of: of the batch's length.
        seed: documents are masked anew each time they are seen; the order of calls and the seed decide how.
    """

    pad_token_id: int
    vocab_size: int
    cm3: CM3Settings | None = None
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self._calls = 0

    def _generator(self) -> np.random.Generator:
        worker = torch.utils.data.get_worker_info()
        self._calls += 1
        return np.random.default_rng([self.seed, worker.id if worker else 0, self._calls])

    def skip_batches(self, count: int) -> None:
        """Go on as if `count` batches had been made: for a run that continues."""
        self._calls += count

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rng = self._generator()
        rows = []
        for index, feature in enumerate(features):
            ids = np.asarray(feature["input_ids"], dtype=np.int64)
            if ids.ndim != 1 or ids.size == 0:
                raise ValueError(f"Row {index} of the batch: expected a non-empty list of ids, got shape {ids.shape}.")
            if ids.min() < 0 or ids.max() >= self.vocab_size:
                raise ValueError(
                    f"Row {index} of the batch has ids {ids.min()}..{ids.max()}, outside the vocabulary "
                    f"0..{self.vocab_size - 1}. (-100 belongs into labels, which are made here, never into input_ids.)"
                )
            if self.max_length is not None and len(ids) > self.max_length:
                raise ValueError(
                    f"Row {index} of the batch has {len(ids)} tokens, max_length is {self.max_length}. Split or drop long "
                    "documents when encoding them."
                )
            rows.append(cm3(ids, self.cm3, rng, self.max_length) if self.cm3 is not None else ids)
        length = max(map(len, rows))
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        input_ids = torch.full((len(rows), length), self.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for index, ids in enumerate(rows):
            input_ids[index, : len(ids)] = torch.from_numpy(ids)
            attention_mask[index, : len(ids)] = 1
        labels = input_ids.masked_fill(attention_mask == 0, -100)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
