"""Where rows of an output tensor come from: a parent's tensor, a parent's vocabulary seen through a row map, noise,
constants.

It knows parents and row maps; which tensor needs which source is the business of tables.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from ..checkpoints.parent import Parent
from ..checkpoints.tensor_files import TensorSpec
from . import inits
from .parents import Decoder, ImageCodes
from .vocabulary import RowMap


_ROWS = 1 << 10  # of a vocabulary read at a time


class ParentRows:
    """A parent's tensor, or its rows `[first, last)`, row by row."""

    def __init__(self, parent: Parent, key: str, first: int = 0, last: int | None = None):
        self.parent, self.key, self.first = parent, key, first
        self.spec = parent.require(key)
        if last is not None:
            self.spec = TensorSpec((last - first, *self.spec.shape[1:]), self.spec.dtype)
        if not self.spec.dtype.is_floating_point:
            raise ValueError(
                f"Tensor '{key}' of the {parent.role}, in {parent.where(key)}, is {self.spec.dtype}; expected floats. "
                "If it is a quantised model, take the unquantised one."
            )
        self.inputs = ((parent, key),)
        self.loads = 0

    def read(self, first: int, last: int) -> torch.Tensor:
        return self.parent.read(self.key, self.first + first, self.first + last)

    def release(self) -> None:
        pass


class VocabularyRows:
    """An embedding or a head of a parent, in the order of the JAM's vocabulary.

    Rows that are the parent's own, one for one, are streamed. Where others are needed, the parent's tensor is kept
    until `release`. Tokens of which the parent knows nothing get the mean of its rows.
    """

    def __init__(self, decoder: Decoder, key: str, row_map: RowMap, codes: ImageCodes | None = None):
        self.decoder, self.key, self.map = decoder, key, row_map
        self.spec = decoder.parent.require(key)
        self.folded = codes.folded if codes is not None and key == decoder.embedding_key else None
        keys = [key, *(sorted(codes.used - set(codes.head.values())) if self.folded is not None else ())]
        self.inputs = tuple((decoder.parent, name) for name in keys)
        self._needs_table = bool((row_map.offsets[-1] > row_map.offsets[row_map.identity]).item())
        extra = self.folded.numel() * self.spec.dtype.itemsize if self.folded is not None else 0
        self.loads = self.spec.nbytes + extra if self._needs_table else 0
        self._table: torch.Tensor | None = None
        self._mean: torch.Tensor | None = None
        self._lock = threading.Lock()

    @property
    def present(self) -> torch.Tensor:
        return self.map.present

    def read(self, first: int, last: int) -> torch.Tensor:
        split = min(max(first, self.map.identity), last)
        if split == last:
            return self.decoder.parent.read(self.key, first, last)
        rest = self._mapped(split, last)
        return torch.cat((self.decoder.parent.read(self.key, first, split), rest)) if first < split else rest

    def _mapped(self, first: int, last: int) -> torch.Tensor:
        offsets = self.map.offsets[first : last + 1]
        counts = offsets.diff()
        made = self.mean().repeat(last - first, 1)
        if not counts.any():
            return made
        index = torch.arange(last - first).repeat_interleave(counts)
        rows = self.table()[self.map.rows[offsets[0] : offsets[-1]]]
        single = counts == 1
        made[single] = rows[single[index]]
        several = counts > 1
        if several.any():
            sums = torch.zeros(made.shape, dtype=torch.float32).index_add_(0, index, rows.float())
            made[several] = (sums[several] / counts[several, None]).to(made.dtype)
        return made

    def table(self) -> torch.Tensor:
        """The parent's rows, and behind them those that other modules fold into; filled in blocks, so that it is
        held once.
        """
        with self._lock:
            if self._table is None:
                folded = self.folded if self.folded is not None else torch.empty(0, self.spec.row_numel)
                table = torch.empty((self.spec.rows + len(folded), self.spec.row_numel), dtype=self.spec.dtype)
                for first in range(0, self.spec.rows, _ROWS):
                    last = min(first + _ROWS, self.spec.rows)
                    table[first:last] = self.decoder.parent.read(self.key, first, last)
                table[self.spec.rows :] = folded
                self._table = table
            return self._table

    def mean(self) -> torch.Tensor:
        """`[1, d]`: mean of the parent's rows."""
        with self._lock:
            if self._mean is None:
                total = torch.zeros(self.spec.row_numel, dtype=torch.float64)
                for first in range(0, self.spec.rows, _ROWS):
                    rows = self.decoder.parent.read(self.key, first, min(first + _ROWS, self.spec.rows))
                    total += rows.sum(0, dtype=torch.float64)
                self._mean = (total / self.spec.rows).to(self.spec.dtype)[None]
        return self._mean

    def release(self) -> None:
        self._table = None


class Combined:
    """Rows of two vocabularies, combined by a function that also sees which token each of them knows.

    combine: `(first, last, text rows, image rows) -> rows`.
    """

    def __init__(
        self,
        text: VocabularyRows,
        image: VocabularyRows,
        combine: Callable[[int, int, torch.Tensor, torch.Tensor], torch.Tensor],
    ):
        self.text, self.image, self.combine = text, image, combine
        self.inputs = (*text.inputs, *image.inputs)
        self.loads = text.loads + image.loads

    def read(self, first: int, last: int) -> torch.Tensor:
        return self.combine(first, last, self.text.read(first, last), self.image.read(first, last))

    def release(self) -> None:
        self.text.release()
        self.image.release()


class Noise:
    """Normal noise of a new tensor (cross blocks, projections); std 0 gives zeros."""

    inputs: tuple = ()
    loads = 0

    def __init__(self, key: str, row_shape: tuple[int, ...], std: float, seed: int, dtype: torch.dtype):
        self.key, self.row_shape, self.std, self.seed, self.dtype = key, row_shape, std, seed, dtype

    def read(self, first: int, last: int) -> torch.Tensor:
        shape = (last - first, *self.row_shape)
        if not self.std:
            return torch.zeros(shape, dtype=self.dtype)
        return inits.normal(shape, self.std, self.key, first, self.seed)

    def release(self) -> None:
        pass


class Constant:
    """Rows of ones (norms) or of a tensor in memory (the VQ model's)."""

    inputs: tuple = ()
    loads = 0

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor

    def read(self, first: int, last: int) -> torch.Tensor:
        return self.tensor[first:last] if self.tensor.dim() else self.tensor

    def release(self) -> None:
        pass
