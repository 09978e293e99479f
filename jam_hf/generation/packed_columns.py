"""Whose each column of a cache is, while branches of guidance stand in it beside the document.

`MixedColumns` lays a step's columns behind one another, as any cache takes them. `LaneColumns` gives the branches a
lane of a `JamBlockCache`, so that `lane_attention` can read for each token its own columns alone: a packed step then
reads of the cache what the document and the branch would read one after the other, and no more. Both make the same
mask, which any attention can follow. What the branches are is unknown here (guidance_jam.py).

Shape suffixes: B rows, Q ids fed, C columns of the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.cache_utils import StaticLayer

from ..model.transformers_private_jam import sdpa_attention_forward
from .block_cache import gather_columns


DEAD, DOCUMENT = -1, 0  # owners of a column of the cache; branches follow from 1 on


class MixedColumns:
    """Columns stand in the order in which they were fed, the document's among the branches'."""

    def __init__(self, cache: Any, owner: torch.Tensor):
        """`owner`: of the document's columns, all that `cache` holds; int8 `[B, C]`, DOCUMENT or DEAD (padding)."""
        self.cache, self.owner = cache, owner
        self.length, self.beside = owner.shape[1], 0  # columns of the document, and beside them
        self.of_document = torch.ones(self.length, dtype=torch.bool, device=owner.device)

    def append(self, owners: torch.Tensor, document: int, dtype: torch.dtype) -> dict[str, Any]:
        """Lay `owners` int8 `[B, Q]` beside the columns, the first `document` of them the document's.

        Returns what the forward that feeds them takes: an `attention_mask` `[B, 1, Q, C]`, to be added to scores.
        """
        count, first = owners.shape[1], self.owner.shape[1]
        self.owner = torch.cat((self.owner, owners), dim=1)
        self.of_document = torch.cat((self.of_document, torch.arange(count, device=owners.device) < document))
        self.length, self.beside = self.length + document, self.beside + count - document
        seen = self.owner[:, None, :] == owners[:, :, None]
        in_order(seen[:, :, first:])
        layer = self.cache.layers[0]
        if isinstance(layer, StaticLayer):
            seen = torch.nn.functional.pad(seen, (0, layer.max_cache_len - self.owner.shape[1]))
        return {"attention_mask": added(seen, dtype)}

    def leave(self, rows: list[int]) -> None:
        """The branches' columns of these rows are nobody's from here on."""
        gone = self.owner[rows]
        self.owner[rows] = torch.where(gone > DOCUMENT, DEAD, gone)

    def keep_those_of_branches(self) -> None:
        """Take out columns that are nobody's, as far as no row needs them."""
        self._keep(int((self.owner > DOCUMENT).sum(1).max()))

    def close(self) -> None:
        """Leave the document's columns alone in the cache."""
        self.owner = torch.where(self.owner > DOCUMENT, DEAD, self.owner)
        self._keep(0)

    def reorder(self, rows: torch.LongTensor) -> None:
        """The rows of the cache have been moved."""
        self.owner = self.owner[rows]

    def _keep(self, beside: int) -> None:
        """The document's columns, in order, then `beside` more: those of the row's branches, in order, first among
        them.
        """
        rank = torch.where(self.of_document, 0, torch.where(self.owner > DOCUMENT, 1, 2))
        index_BC = rank.argsort(dim=1, stable=True)[:, : self.length + beside]
        for layer in self.cache.layers:
            for name in ("keys", "values"):
                states = getattr(layer, name)
                kept = gather_columns(states, index_BC)
                if isinstance(layer, StaticLayer):
                    states[:, :, : kept.shape[2]] = kept
                else:
                    setattr(layer, name, kept)
            if isinstance(layer, StaticLayer):
                layer.cumulative_length.fill_(index_BC.shape[1])
        self.owner = self.owner.gather(1, index_BC)
        self.of_document = torch.arange(index_BC.shape[1], device=index_BC.device) < self.length
        self.beside = beside


class LaneColumns:
    """The document's columns stand in a row, as without guidance, and the branches' in a lane that begins behind room
    for more.

    The same interface as `MixedColumns`.
    """

    def __init__(self, cache: Any, owner: torch.Tensor):
        self.cache, self.document, self.lane = cache, owner, owner[:, :0]
        self.start = owner.shape[1]  # where the lane begins: no room yet

    @property
    def length(self) -> int:
        return self.document.shape[1]

    @property
    def beside(self) -> int:
        return self.lane.shape[1]

    def append(self, owners: torch.Tensor, document: int, dtype: torch.dtype) -> dict[str, Any]:
        """See `MixedColumns.append`; beside the mask, `jam_lanes` says how `lane_attention` may read it."""
        laid = (self.length, self.beside)
        self.document = torch.cat((self.document, owners[:, :document]), dim=1)
        self.lane = torch.cat((self.lane, owners[:, document:]), dim=1)
        if self.length > self.start or not laid[1]:
            block = self.cache.layers[0].block_size
            self.start = (self.length // block + 1) * block
        for layer in self.cache.layers:
            layer.open_lane(laid[0], self.start, document)
        rows, count = owners.shape
        seen = torch.zeros(rows, count, self.start + self.beside, dtype=torch.bool, device=owners.device)
        seen[:, :, : self.length] = self.document[:, None, :] == owners[:, :, None]
        seen[:, :, self.start :] = self.lane[:, None, :] == owners[:, :, None]
        in_order(seen[:, :document, laid[0] : self.length])
        in_order(seen[:, document:, self.start + laid[1] :])
        return {"attention_mask": added(seen, dtype), "jam_lanes": (document, self.length, self.start)}

    def leave(self, rows: list[int]) -> None:
        self.lane[rows] = DEAD

    def keep_those_of_branches(self) -> None:
        if not self.beside:
            return
        beside = int((self.lane > DOCUMENT).sum(1).max())
        index_BC = (self.lane <= DOCUMENT).to(torch.int8).argsort(dim=1, stable=True)[:, :beside]
        for layer in self.cache.layers:
            layer.keep_in_lane(index_BC)
        self.lane = self.lane.gather(1, index_BC)

    def close(self) -> None:
        for layer in self.cache.layers:
            if layer.lane is not None:
                layer.close_lane()

    def reorder(self, rows: torch.LongTensor) -> None:
        self.document, self.lane = self.document[rows], self.lane[rows]


def in_order(new: torch.Tensor) -> None:
    """Among the columns that are fed together, bool `[B, Q, Q]`, in place: each sees those before it and itself, lest a
    row of the mask be empty.
    """
    each = torch.arange(new.shape[1], device=new.device)
    new.logical_and_(each[:, None] >= each).logical_or_(each[:, None] == each)


def added(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bool `[B, Q, C]` -> what is added to scores, `[B, 1, Q, C]`."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def lane_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    jam_lanes: tuple[int, int, int] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """sdpa, where the document's tokens read the document's columns and the branches' tokens their lane (ours [R]).

    The result is that of sdpa with the same mask: what is left unread is masked. Without lanes it is sdpa.

    Args:
        query: `[B, heads, Q, D]`; key, value: `[B, key/value heads, C, D]`. attention_mask: `[B, 1, Q, C]`.
        jam_lanes: of `LaneColumns`: how many of the Q are the document's, how many of the C, and where the lane begins.
    Returns:
        `[B, Q, heads, D]`, and no attention weights.
    """
    if jam_lanes is None or kwargs.get("position_bias") is not None:  # a bias has a place for each pair of columns
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    fed, length, start = jam_lanes
    parts = [(slice(None, fed), slice(None, length)), (slice(fed, None), slice(start, None))]
    results = [
        sdpa_attention_forward(
            module, query[:, :, own], key[:, :, read], value[:, :, read], attention_mask[:, :, own, read], **kwargs
        )[0]
        for own, read in parts
        if query[:, :, own].shape[2]
    ]
    return results[0] if len(results) == 1 else torch.cat(results, dim=1), None


# transformers finds an attention by the name in the model's config alone, which threads share: under a name of its own,
# this one would have to be switched on there for the length of a picture. Under the name of sdpa it is sdpa wherever no
# lanes are passed, in other models too.
AttentionInterface.register("sdpa", lane_attention)

__all__ = ["LaneColumns", "MixedColumns", "lane_attention"]
