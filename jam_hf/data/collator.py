"""Batches for training: the CM3 objective on the fly, padding or packing, and labels - the one path by which labels are
made.

It knows ids, not models. Every token but padding is a label, image codes included.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from ..model.class_names_jam import MODEL_TYPE
from ..model.families_jam import FAMILIES
from .cm3 import CM3Settings, cm3
from .seeds import check_seed


@dataclass
class JamDataCollator:
    """Collate `{"input_ids": [...]}` into `input_ids`, `attention_mask` and `labels`, int64 `[B, T]`, padded on the
    right.

    With `packing`, short documents share rows as long as the longest document: `[R, T]`, R <= B, and `position_ids`
    that begin anew with each document (and with the padding) instead of `attention_mask`. transformers keeps documents
    that are packed so apart, in Llama's decoder and in every cross JAM, so the loss is that of the same documents in
    rows of their own. The stock OPT decoder does not; see `supports_packing`.

    Args:
        pad_token_id: id of the padding; its labels are -100.
        vocab_size: ids outside `[0, vocab_size)` are refused.
        cm3: settings of the CM3 objective; `None`: plain causal documents.
        max_length: longer documents raise a `ValueError` (they are never cut in silence); CM3 cuts as [M] says.
        pad_to_multiple_of: of the batch's length.
        seed: documents are masked anew each time they are seen; the order of calls and the seed decide how. In
            dataloader workers, which start afresh each epoch, the seed that torch gives the worker decides as well.
            Processes that share the batches (data parallelism) mask each in its own way.
        cm3_probability: share of documents that go through `cm3`; the others stay plain.
        packing: several documents a row; less padding where lengths differ, without batches of one kind of document.
    """

    pad_token_id: int
    vocab_size: int
    cm3: CM3Settings | None = None
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    seed: int = 0
    cm3_probability: float = 1.0
    packing: bool = False

    def __post_init__(self) -> None:
        check_seed(self.seed, "JamDataCollator")
        if not 0 <= self.cm3_probability <= 1:
            raise ValueError(f"JamDataCollator: cm3_probability must be in 0..1, got {self.cm3_probability}.")
        self._calls = 0

    def _generator(self) -> np.random.Generator:
        worker = torch.utils.data.get_worker_info()
        self._calls += 1
        rank = _rank()
        return np.random.default_rng([self.seed, worker.seed if worker else 0, self._calls, *([rank] if rank else [])])

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
            if self.max_length is not None and len(ids) > self.max_length:
                raise ValueError(
                    f"Row {index} of the batch has {len(ids)} tokens, max_length is {self.max_length}. Split or drop "
                    "long documents when encoding them."
                )
            rows.append(ids)
        self._check_vocabulary(rows)
        if self.cm3 is not None:
            rows = [self._mask(index, ids, rng) for index, ids in enumerate(rows)]
        length = max(len(ids) for ids in rows)
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        return self._packed(rows, length) if self.packing else self._padded(rows, length)

    def _padded(self, rows: list[np.ndarray], length: int) -> dict[str, torch.Tensor]:
        kept = np.arange(length) < np.array([len(ids) for ids in rows])[:, None]
        padded: np.ndarray = np.full((len(rows), length), self.pad_token_id, dtype=np.int64)
        padded[kept] = np.concatenate(rows)
        input_ids, mask = torch.from_numpy(padded), torch.from_numpy(kept)
        return {"input_ids": input_ids, "attention_mask": mask.long(), "labels": input_ids.masked_fill(~mask, -100)}

    def _packed(self, rows: list[np.ndarray], length: int) -> dict[str, torch.Tensor]:
        bins: list[list[np.ndarray]] = []
        used: list[int] = []
        for ids in sorted(rows, key=len, reverse=True):  # first fit, the longest first
            index = next((i for i, taken in enumerate(used) if taken + len(ids) <= length), len(bins))
            if index == len(bins):
                bins.append([])
                used.append(0)
            bins[index].append(ids)
            used[index] += len(ids)
        input_ids: np.ndarray = np.full((len(bins), length), self.pad_token_id, dtype=np.int64)
        labels = np.full_like(input_ids, -100)
        positions = np.zeros_like(input_ids)
        for row, documents in enumerate(bins):
            start = 0
            for ids in documents:
                end = start + len(ids)
                input_ids[row, start:end] = ids
                labels[row, start + 1 : end] = ids[1:]  # nothing before a document says how it begins
                positions[row, start:end] = np.arange(len(ids))
                start = end
            positions[row, start:] = np.arange(length - start)
        arrays = {"input_ids": input_ids, "position_ids": positions, "labels": labels}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _check_vocabulary(self, rows: list[np.ndarray]) -> None:
        together = np.concatenate(rows)
        if together.min() >= 0 and together.max() < self.vocab_size:
            return
        index = next(i for i, ids in enumerate(rows) if ids.min() < 0 or ids.max() >= self.vocab_size)
        raise ValueError(
            f"Row {index} of the batch has ids {rows[index].min()}..{rows[index].max()}, outside the vocabulary "
            f"0..{self.vocab_size - 1}. (-100 belongs into labels, which are made here, never into input_ids.)"
        )

    def _mask(self, index: int, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if self.cm3 is None or self.cm3_probability < 1 and rng.random() >= self.cm3_probability:
            return ids
        try:
            return cm3(ids, self.cm3, rng, self.max_length)
        except ValueError as error:
            raise ValueError(f"Row {index} of the batch: {error}") from None


def _rank() -> int:
    """Which of the processes that train together this is; a dataloader worker is told by its environment."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", 0))


def supports_packing(config: PreTrainedConfig) -> bool:
    """Whether a model with this config keeps packed documents apart, as all stock decoders but OPT's do, or a JAM
    of such.
    """
    if config.model_type == MODEL_TYPE:
        return config.fusion_mode == "cross" or supports_packing(config.text_config)
    return config.model_type in FAMILIES and FAMILIES[config.model_type].keeps_documents_apart
