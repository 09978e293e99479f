"""How tensors of a checkpoint will be made, before any is: bands of rows, the sources of a band, and the files they go
to.

It knows no maths, no key names, and nothing of files but their names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from .parent import Parent
from .tensor_files import TensorSpec, row_blocks


class RowSource(Protocol):
    """Something that yields rows of one tensor: a parent's, noise, a constant, or several of them combined."""

    def read(self, first: int, last: int) -> torch.Tensor:
        """Rows `[first, last)`."""

    def release(self) -> None:
        """Forget what was kept to answer `read`."""


@dataclass(frozen=True)
class Band:
    """Consecutive rows of an output tensor: `make` of the same rows of all sources, block by block."""

    rows: int
    sources: tuple[RowSource, ...]
    make: Callable[..., torch.Tensor]


@dataclass(frozen=True)
class TensorPlan:
    """How one output tensor is made. what: in words, for people. inputs: the parents' tensors that it comes from."""

    spec: TensorSpec
    bands: tuple[Band, ...]
    what: str = ""
    inputs: tuple[tuple[Parent, str], ...] = ()
    loads: int = 0  # bytes that its sources keep in memory while it is made

    def blocks(self) -> Iterator[tuple[int, int, Callable[[], torch.Tensor]]]:
        """(first row, number of rows, function that makes them) for blocks of about `BLOCK_BYTES`."""
        start = 0
        for band in self.bands:
            for first, last in row_blocks(self.spec, band.rows):
                yield start + first, last - first, partial(_make, band, first, last)
            start += band.rows

    def tensor(self) -> torch.Tensor:
        """The whole tensor: what the blocks are, put together."""
        made = [make().reshape(rows, *self.spec.shape[1:]) for _, rows, make in self.blocks()]
        return torch.cat(made).reshape(self.spec.shape)


def _make(band: Band, first: int, last: int) -> torch.Tensor:
    return band.make(*(source.read(first, last) for source in band.sources))


def plan_shards(
    specs: dict[str, TensorSpec], max_shard_size: str
) -> tuple[dict[str, list[str]], dict[str, Any] | None]:
    """Keys by file name, and the index (None where one file holds all)."""
    plan = split_state_dict_into_shards_factory(
        specs,
        get_storage_size=lambda spec: spec.nbytes,
        get_storage_id=lambda spec: None,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename} if plan.is_sharded else None
    return plan.filename_to_tensors, index
