"""Guidance in one batched forward: the branches are columns of the document's own cache.

A step inside a picture feeds its last id once for the document and once for each branch, and a mask keeps their columns
of the cache apart (packed_columns.py). So guidance costs one forward a code, its memory is the branch's context and the
codes so far, and text is written as without it. It does not know the formulas (guidance_jam.py).

Shape suffixes: B rows, G branches, K codes of the codebook, Q ids fed, C columns of the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from ..model.grammar_jam import left_padded
from ..model.guidance_jam import Guidance, GuidanceSettings, SeparateGuidance
from ..model.rotation_jam import one_rotation
from .block_cache import JamBlockCache, JamBlockLayer
from .packed_columns import DEAD, DOCUMENT, LaneColumns, MixedColumns


if TYPE_CHECKING:
    from transformers import Cache


class PackedGuidance(Guidance):
    """All branches in the document's own forward and cache.

    Beside each of the document's columns, the cache gets one for each branch while rows are inside pictures. `columns`
    says
    whose each is, row by row: the document's, a branch's, or nobody's (padding, branches of rows in text, pictures that
    are done). When no row is inside a picture any more, the columns beside the document's are taken out again.
    """

    def __init__(self, *args: Any, cache: Cache, beside: int, **kwargs: Any):
        """`beside`: see `columns_beside`."""
        super().__init__(*args, **kwargs)
        self.cache, self.beside = cache, beside
        self.separate: SeparateGuidance | None = None  # where the cache holds more than the document (prefix tuning)
        self.columns: MixedColumns | LaneColumns | None = None  # while there are more than the document's
        self.positions: torch.Tensor | None = None  # int64 [B, G]: of the next id of each branch
        self.live: list[bool] = []
        self._owners: torch.Tensor | None = None  # int8 [B, 1 + G]: of a step's columns, while the same rows are live
        self.fed: tuple[int, list[torch.Tensor]] | None = (
            None  # a length of the document, and what the branches say of it
        )

    @staticmethod
    def serves(model: Any, cache: Any, beside: int, max_length: int, longest: int) -> bool:
        """Whether columns may be laid into this cache under this model's attention, `beside` of them beyond
        `max_length`.

        `longest`: positions of the document or of a branch, whichever has more: all are rotated together.
        """
        layers = getattr(cache, "layers", None)
        if not layers or type(cache) not in (DynamicCache, StaticCache, JamBlockCache) or cache.offloading:
            return False
        if not all(type(layer) in (DynamicLayer, StaticLayer, JamBlockLayer) for layer in layers):  # none that slides
            return False
        if any(isinstance(layer, StaticLayer) and layer.max_cache_len < max_length - 1 + beside for layer in layers):
            return False
        configs = model.config.decoder_configs
        if not one_rotation(configs, longest):
            return False
        return all(config._attn_implementation in ("eager", "sdpa") for config in configs)

    @staticmethod
    def columns_beside(picture_length: int, settings: GuidanceSettings, longest_context: int) -> int:
        """How many columns beside the document's the cache may come to hold: two pictures' worth, so that those of
        pictures that are done are taken out seldom.
        """
        return 2 * len(settings.branches) * (longest_context + picture_length + 2)

    # -- a step ------------------------------------------------------------------------------------------------------

    def prepare(self, input_ids: torch.LongTensor, model_inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs of a step that feeds the last id of `input_ids` `[B, T]`, with the branches beside it."""
        self.fed = None
        positions = self.guided(input_ids)
        if max(positions) < 0:
            self.settle()
            return model_inputs
        if not self._holds_the_document(input_ids.shape[1] - 1):
            return model_inputs
        self._open(input_ids[:, :-1], positions, fed=1)
        self._retire(positions)
        count = len(self.settings.branches)
        self._make_room(1 + count)
        rows, device = input_ids.shape[0], input_ids.device
        if self._owners is None:
            live_B1 = torch.tensor(self.live)[:, None]
            owners = torch.where(live_B1, torch.arange(1 + count), torch.tensor([DOCUMENT] + [DEAD] * count))
            self._owners = owners.to(device, torch.int8)
        laid = self.columns.append(self._owners, 1, self.model.dtype)
        position_ids = torch.cat((model_inputs["position_ids"].expand(rows, 1), self.positions), dim=1)
        self.positions = self.positions + 1  # those of rows in text are set anew when they open a picture
        self.fed = (input_ids.shape[1], [])
        return model_inputs | {
            "input_ids": model_inputs["input_ids"].expand(rows, 1 + count).contiguous(),
            "position_ids": position_ids,
            "logits_to_keep": 1 + count,
            **laid,
        }

    def take(self, outputs: Any) -> None:
        """Take what belongs to the branches out of the outputs of a step that `prepare` made."""
        if self.fed is None or self.fed[1]:
            return
        logits = outputs.logits
        codes = logits[:, 1:]
        if logits.shape[-1] > self.grammar.last_code:  # of the whole vocabulary, not of the codes alone
            codes = codes[..., self.grammar.codes]
        self.fed[1].extend(codes.unbind(1))
        outputs.logits = logits[:, :1]
        for name in ("hidden_states", "image_hidden_states"):
            if outputs.get(name) is not None:
                outputs[name] = tuple(states if states is None else states[:, :1] for states in outputs[name])

    def logits(self, input_ids: torch.LongTensor) -> list[torch.Tensor] | None:
        """See `SeparateGuidance.logits`. A picture half-drawn in the prompt is told to the branches here."""
        positions = self.guided(input_ids)
        if max(positions) < 0:
            return None
        if self.fed is not None and self.fed[0] == input_ids.shape[1]:
            return self.fed[1]
        if not self._holds_the_document(input_ids.shape[1]):
            return self.separate.logits(input_ids)
        self.fed = (input_ids.shape[1], self._open(input_ids, positions, fed=0))
        return self.fed[1]

    def reorder(self, rows: torch.LongTensor) -> None:
        """Beam search has moved the rows of the cache."""
        if self.columns is not None:
            self.columns.reorder(rows)
            self.positions = self.positions[rows]
            self.live = [self.live[row] for row in rows.tolist()]
            self._owners = None

    # -- columns -----------------------------------------------------------------------------------------------------

    def _holds_the_document(self, length: int) -> bool:
        """Whether the cache holds the document's first `length` ids and, if anything, the branches beside them."""
        if (
            self.separate is None
            and self.columns is None
            and int(self.cache.get_seq_length()) != length + self.embedded
        ):
            others = (self.model, self.settings, self.reader, self.contexts, self.prompt_mask, self.embedded)
            self.separate = SeparateGuidance(*others)
        return self.separate is None

    def _begin(self, rows: int, length: int, device: torch.device) -> None:
        """The cache holds the document's first `length` ids and nothing else."""
        owner = torch.full((rows, length), DOCUMENT, dtype=torch.int8, device=device)
        if self.prompt_mask is not None:
            padding = self.prompt_mask[:, :length] == 0
            owner[:, : padding.shape[1]].masked_fill_(padding, DEAD)
        if all(isinstance(layer, JamBlockLayer) for layer in self.cache.layers):
            self.columns = LaneColumns(self.cache, owner)
        else:
            self.columns = MixedColumns(self.cache, owner)
        self.positions = torch.zeros(rows, len(self.settings.branches), dtype=torch.int64, device=device)
        self.live = [False] * rows

    def _open(self, input_ids: torch.LongTensor, positions: list[int], fed: int) -> list[torch.Tensor] | None:
        """Tell the branches of rows that entered a picture all up to the end of `input_ids`; the logits of the last id.

        `fed`: how many ids of `positions` are not among `input_ids` yet.
        """
        entered = [
            row
            for row, position in enumerate(positions)
            if position >= 0 and (self.columns is None or not self.live[row])
        ]
        if not entered:
            return None
        rows, device = input_ids.shape[0], input_ids.device
        if self.columns is None:
            self._begin(rows, int(self.cache.get_seq_length()), device)
        results = []
        for branch_number, branch in enumerate(self.settings.branches, start=1):
            told: list[list[int]] = [[]] * rows
            for row in entered:
                at = positions[row] - fed
                told[row] = self.branch_ids(branch, input_ids, row, at)
            ids, mask = left_padded(told, self.pad, device)
            self._make_room(ids.shape[1])
            owners = torch.where(mask == 1, branch_number, DEAD).to(torch.int8)
            laid = self.columns.append(owners, 0, self.model.dtype)
            results.append(self._forward(ids, (mask.cumsum(-1) - 1).clamp(min=0), self.cache, **laid))
            lengths = mask.sum(1)
            place = self.positions[:, branch_number - 1]
            self.positions[:, branch_number - 1] = torch.where(lengths > 0, lengths, place)
        for row in entered:
            self.live[row] = True
        self._owners = None
        return results

    def _retire(self, positions: list[int]) -> None:
        """Rows whose picture is done leave their branches' columns to nobody."""
        left = [row for row, position in enumerate(positions) if position < 0 and self.live[row]]
        if left:
            self.columns.leave(left)
            for row in left:
                self.live[row] = False
            self._owners = None

    def _make_room(self, count: int) -> None:
        """Before `count` more columns are laid: take out those of nobody when there are too many."""
        if self.columns.beside + count > self.beside:
            self.columns.keep_those_of_branches()

    def settle(self) -> None:
        """Leave the document's columns alone in the cache."""
        if self.columns is not None:
            self.columns.close()
            self.columns, self.fed, self.live = None, None, [False] * len(self.live)


__all__ = ["PackedGuidance"]
