"""Guidance in one batched forward: the branches are columns of the document's own cache.

A step inside a picture feeds its last id once for the document and once for each branch, and a mask keeps their columns of the
cache apart. So guidance costs one forward a code, its memory is the branch's context and the codes so far, and text is written
as without it. It does not know the formulas (guidance_jam.py).

Shape suffixes: B rows, G branches, K codes of the codebook, Q ids fed, C columns of the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from .caching_jam import JamBlockCache, JamBlockLayer
from .guidance_jam import Guidance, GuidanceSettings, SeparateGuidance


if TYPE_CHECKING:
    from transformers import Cache

DEAD, DOCUMENT = -1, 0  # owners of a column of the cache; branches follow from 1 on


class PackedGuidance(Guidance):
    """All branches in the document's own forward and cache.

    Beside each of the document's columns, the cache gets one for each branch while rows are inside pictures. `owner` `[B, C]`
    says whose each is, row by row: the document's, a branch's, or nobody's (padding, branches of rows in text, pictures that
    are done). When no row is inside a picture any more, the columns beside the document's are taken out again.
    """

    def __init__(self, *args: Any, cache: Cache, beside: int, **kwargs: Any):
        """`beside`: see `columns_beside`."""
        super().__init__(*args, **kwargs)
        self.cache, self.beside = cache, beside
        self.separate: SeparateGuidance | None = None  # where the cache holds more than the document (prefix tuning)
        self.static = any(isinstance(layer, StaticLayer) for layer in cache.layers)
        self.columns = 0  # of the cache, while there are more than the document's
        self.owner: torch.Tensor | None = None  # int8 [B, C]
        self.of_document: torch.Tensor | None = None  # bool [C]
        self.positions: torch.Tensor | None = None  # int64 [B, G]: of the next id of each branch
        self.live: list[bool] = []
        self._owners: torch.Tensor | None = None  # int8 [B, 1 + G]: of a step's columns, while the same rows are live
        self.fed: tuple[int, list[torch.Tensor]] | None = None  # a length of the document, and what the branches say of it

    @staticmethod
    def serves(model: Any, cache: Any, beside: int, max_length: int) -> bool:
        """Whether columns may be laid into this cache under this model's attention, `beside` of them beyond `max_length`."""
        layers = getattr(cache, "layers", None)
        if not layers or type(cache) not in (DynamicCache, StaticCache, JamBlockCache) or cache.offloading:
            return False
        if not all(type(layer) in (DynamicLayer, StaticLayer, JamBlockLayer) for layer in layers):  # none that slides
            return False
        if any(isinstance(layer, StaticLayer) and layer.max_cache_len < max_length - 1 + beside for layer in layers):
            return False
        configs = model.config.decoder_configs
        return all(config._attn_implementation in ("eager", "sdpa") for config in configs)

    @staticmethod
    def columns_beside(picture_length: int, settings: GuidanceSettings, longest_context: int) -> int:
        """How many columns beside the document's the cache may come to hold: two pictures' worth, so that those of pictures
        that are done are taken out seldom."""
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
        mask = self._append(self._owners, document=1)
        position_ids = torch.cat((model_inputs["position_ids"].expand(rows, 1), self.positions), dim=1)
        self.positions = self.positions + 1  # those of rows in text are set anew when they open a picture
        self.fed = (input_ids.shape[1], [])
        return model_inputs | {
            "input_ids": model_inputs["input_ids"].expand(rows, 1 + count).contiguous(),
            "position_ids": position_ids,
            "attention_mask": mask,
            "logits_to_keep": 1 + count,
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
        if self.columns:
            self.owner, self.positions = self.owner[rows], self.positions[rows]
            self.live = [self.live[row] for row in rows.tolist()]
            self._owners = None

    # -- columns -----------------------------------------------------------------------------------------------------

    def _holds_the_document(self, length: int) -> bool:
        """Whether the cache holds the document's first `length` ids and, if anything, the branches beside them."""
        if self.separate is None and not self.columns and int(self.cache.get_seq_length()) != length + self.embedded:
            others = (self.model, self.settings, self.reader, self.contexts, self.prompt_mask, self.embedded)
            self.separate = SeparateGuidance(*others)
        return self.separate is None

    def _begin(self, rows: int, length: int, device: torch.device) -> None:
        """The cache holds the document's first `length` ids and nothing else."""
        owner = torch.full((rows, length), DOCUMENT, dtype=torch.int8, device=device)
        if self.prompt_mask is not None:
            padding = self.prompt_mask[:, :length] == 0
            owner[:, : padding.shape[1]].masked_fill_(padding, DEAD)
        self.owner, self.of_document = owner, torch.ones(length, dtype=torch.bool, device=device)
        self.positions = torch.zeros(rows, len(self.settings.branches), dtype=torch.int64, device=device)
        self.columns, self.live, self.length = length, [False] * rows, length

    def _append(self, owners: torch.Tensor, document: int) -> torch.Tensor:
        """Lay `owners` int8 `[B, Q]` beside the columns, the first `document` of them the document's: the mask of that
        forward, `[B, 1, Q, C]`, to be added."""
        count, first = owners.shape[1], self.columns
        self.owner = torch.cat((self.owner, owners), dim=1)
        of_document = torch.arange(count, device=owners.device) < document
        self.of_document = torch.cat((self.of_document, of_document))
        self.columns, self.length = first + count, self.length + document
        seen = self.owner[:, None, :] == owners[:, :, None]
        new = seen[:, :, first:]
        # Among the new ones, in order; and each sees itself, lest a row of the mask be empty.
        each = torch.arange(count, device=owners.device)
        new.logical_and_(each[:, None] >= each).logical_or_(each[:, None] == each)
        if self.static:
            seen = torch.nn.functional.pad(seen, (0, self.cache.layers[0].max_cache_len - self.columns))
        dtype = self.model.dtype
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]

    def _open(self, input_ids: torch.LongTensor, positions: list[int], fed: int) -> list[torch.Tensor] | None:
        """Tell the branches of rows that entered a picture all up to the end of `input_ids`; the logits of the last id.

        `fed`: how many ids of `positions` are not among `input_ids` yet.
        """
        entered = [row for row, position in enumerate(positions) if position >= 0 and not (self.columns and self.live[row])]
        if not entered:
            return None
        rows, device = input_ids.shape[0], input_ids.device
        if not self.columns:
            self._begin(rows, int(self.cache.get_seq_length()), device)
        results = []
        for branch_number, branch in enumerate(self.settings.branches, start=1):
            told = [[]] * rows
            for row in entered:
                at = positions[row] - fed
                told[row] = self.branch_ids(branch, input_ids, row, at)
            ids, mask = self.left_padded(told, device)
            self._make_room(ids.shape[1])
            attention_mask = self._append(torch.where(mask == 1, branch_number, DEAD).to(torch.int8), document=0)
            results.append(self._forward(ids, attention_mask, (mask.cumsum(-1) - 1).clamp(min=0), self.cache))
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
            gone = self.owner[left]
            self.owner[left] = torch.where(gone > DOCUMENT, DEAD, gone)
            for row in left:
                self.live[row] = False
            self._owners = None

    def _make_room(self, count: int) -> None:
        """Before `count` more columns are laid: take out those of nobody when there are too many."""
        if self.columns - self.length + count > self.beside:
            self._keep(int((self.owner > DOCUMENT).sum(1).max()))

    def settle(self) -> None:
        """Leave the document's columns alone in the cache."""
        if self.columns:
            self.live = [False] * len(self.live)
            self.owner = torch.where(self.owner > DOCUMENT, DEAD, self.owner)
            self._keep(0)
            self.columns, self.fed = 0, None

    def _keep(self, beside: int) -> None:
        """The document's columns, in order, then `beside` more: those of the row's branches, in order, first among them."""
        rank = torch.where(self.of_document, 0, torch.where(self.owner > DOCUMENT, 1, 2))
        index_BC = rank.argsort(dim=1, stable=True)[:, : self.length + beside]
        for layer in self.cache.layers:
            index = index_BC.to(layer.keys.device)[:, None, :, None]
            for name in ("keys", "values"):
                states = getattr(layer, name)
                kept = states.gather(2, index.expand(-1, states.shape[1], -1, states.shape[3]))
                if isinstance(layer, StaticLayer):
                    states[:, :, : kept.shape[2]] = kept
                else:
                    setattr(layer, name, kept)
            if isinstance(layer, StaticLayer):
                layer.cumulative_length.fill_(index.shape[2])
        self.owner = self.owner.gather(1, index_BC)
        self.of_document = torch.arange(index_BC.shape[1], device=index_BC.device) < self.length
        self.columns = index_BC.shape[1]


__all__ = ["PackedGuidance"]
