"""The grammar of documents with pictures: a state machine over token ids, one state for each row of a batch.

It knows token ids only: no model, no logits, no generation loop. Reading a token is a handful of tensor operations on
the device of the ids, without a copy to the host, so that a step may be compiled.

Shape suffixes: B rows, T positions, V vocabulary, N codes a picture, L tokens of a picture (N where it is codes alone).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch


if TYPE_CHECKING:
    from .configuration_jam import JamConfig

GENERATION_MODES = ("interleaved", "text", "image")

# The kinds of sets of ids that may come next. Words, then words with <break> (+ 1) and with the end (+ 2); one alone;
# codes. From FIRST_FIXED on: one id of the layout of pictures, alone.
WORDS, OPENING, ENDING, CODES, FIRST_FIXED = 0, 4, 5, 6, 7


class PictureState(NamedTuple):
    """Where each row stands; all `[B]`.

    in_picture (bool): after an opening token, before the closing one. position (int64): tokens of that picture so far,
    which is its codes so far where a picture is codes alone. closed (bool): the last token closes a picture. images,
    words (int64): pictures closed, and tokens outside pictures written, since the prompt ended. last (int64): the last
    id, -1 where there is none. room (int64): tokens that may still be written. opened_here (int64): pictures opened
    since the prompt ended, behind the last id of text.
    """

    in_picture: torch.Tensor
    position: torch.Tensor
    closed: torch.Tensor
    images: torch.Tensor
    words: torch.Tensor
    last: torch.Tensor
    room: torch.Tensor
    opened_here: torch.Tensor


@dataclass(frozen=True)
class DocumentRules:
    """What a document may be, beyond the grammar.

    mode: "interleaved" (pictures wherever the model opens one), "text" (none), "image" (one picture, at once).
    min_images, max_images: pictures that are finished from the prompt's end on, one half-drawn in the prompt included.
    image_after_token_ids: a picture follows each of these ids; image_positions: it stands after that many ids of text,
        ascending. Either forces the layout: pictures stand there and, but for those that `min_images` asks for, nowhere
        else. One that does not fit the budget is left out. One that is half-drawn in the prompt is none of them.
    """

    mode: str = "interleaved"
    min_images: int = 0
    max_images: int | None = None
    image_after_token_ids: tuple[int, ...] = ()
    image_positions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.mode not in GENERATION_MODES:
            raise ValueError(f"generation_mode must be one of {str(GENERATION_MODES)[1:-1]}, got {self.mode!r}.")
        for name, count in (("min_new_images", self.min_images), ("max_new_images", self.max_images)):
            if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 0):
                raise ValueError(f"{name} must be a number of pictures, 0 or more, got {count!r}.")
        if self.max_images is not None and self.max_images < max(self.min_images, len(self.image_positions)):
            raise ValueError(
                f"max_new_images={self.max_images} allows fewer pictures than are asked for: min_new_images="
                f"{self.min_images}, image_positions={list(self.image_positions)}."
            )
        places = list(self.image_positions)
        if places != sorted(places) or (places and places[0] < 0):
            raise ValueError(
                f"image_positions must be numbers of text tokens, 0 or more, in ascending order, got {places}."
            )
        asked = self.min_images or self.max_images is not None or self.image_after_token_ids or self.image_positions
        if self.mode != "interleaved" and asked:
            raise ValueError(
                f"generation_mode={self.mode!r} says how many pictures there are: min_new_images, max_new_images, "
                "image_after_token_ids and image_positions go with 'interleaved'."
            )

    @property
    def forced(self) -> bool:
        return bool(self.image_after_token_ids or self.image_positions)


class PictureGrammar:
    """`text* (<break> N codes <break> text*)* <eos>`, row by row (paper, Decoding: one image of exactly N tokens).

    A `<break>` opens a picture unless a picture's token stands before it; then it closes one. Where the config's layout
    says more, its template stands in place of the N codes, and a closing token of its own leaves `<break>` to open.
    """

    def __init__(self, config: JamConfig, eos_token_ids: list[int] | None = None):
        """`eos_token_ids`: what ends a document; the config's where `None`."""
        self.break_token_id = config.break_token_id
        self.image_token_id = config.image_token_id
        self.layout = config.picture_layout
        self.first_code, self.last_code = config.image_token_range[0], config.image_token_range[-1]
        self.codes = slice(self.first_code, self.last_code + 1)
        self.end_token_id, self.structure = self.layout.end, self.layout.structure
        self.picture_length, self.vocab_size = len(self.layout.template), config.vocab_size
        self._constants: dict[object, torch.Tensor] = {}
        ends = config.eos_token_ids if eos_token_ids is None else eos_token_ids
        self.eos_token_ids = [i for i in ends if i is not None]
        reserved = [config.image_token_id, config.mask_end_token_id, config.pad_token_id]
        reserved += [config.mask_token_id + i for i in range(config.num_mask_tokens)]
        reserved += [*self.structure, config.image_end_token_id]
        ends = [
            *self.eos_token_ids,
            *config.eos_token_ids,
        ]  # one that pads too is an end, or text where a call has others
        self.reserved = [i for i in reserved if i is not None and i not in ends]
        # What stands at each position of a picture (-1: a code), the closing token last, and its kind of set.
        self.next_ids = (*self.layout.template, self.end_token_id)
        self.fixed_ids = tuple(dict.fromkeys(i for i in self.next_ids if i >= 0))
        self.next_kinds = tuple(CODES if i < 0 else FIRST_FIXED + self.fixed_ids.index(i) for i in self.next_ids)

    def _on(self, device: torch.device, ids: tuple[int, ...]) -> torch.LongTensor:
        """int64 `[len(ids)]`; copied to a device once, not at every step."""
        if (device, ids) not in self._constants:
            self._constants[device, ids] = torch.tensor(ids, dtype=torch.int64, device=device)
        return self._constants[device, ids]

    def is_picture_token(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """What stands between an opening and a closing token: codes, their placeholders, the layout's own tokens."""
        tokens = (input_ids >= self.first_code) & (input_ids <= self.last_code)
        tokens = tokens | (input_ids == self.image_token_id)
        return tokens | torch.isin(input_ids, self._on(input_ids.device, self.structure)) if self.structure else tokens

    def of_pictures(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """What is no text: the tokens of pictures, and those that open and close them."""
        marks = (input_ids == self.break_token_id) | (input_ids == self.end_token_id)
        return self.is_picture_token(input_ids) | marks

    def state(
        self, input_ids: torch.LongTensor, prompt_length: int | None = None, room: torch.LongTensor | int = 0
    ) -> PictureState:
        """Read the state off the ids of each row.

        Args:
            input_ids: int64 `[B, T]`. T is 0 where the prompt came as `inputs_embeds`, which say nothing of pictures:
                such a row stands in text.
            prompt_length: the ids before it are the prompt; all where `None`.
            room: tokens that may still be written, `[B]` or one number.
        """
        (rows, length), device = input_ids.shape, input_ids.device
        prompt_length = length if prompt_length is None else min(prompt_length, length)
        room = torch.as_tensor(room, dtype=torch.int64, device=device).expand(rows)
        zeros = torch.zeros(rows, dtype=torch.int64, device=device)
        if not length:
            return PictureState(zeros > 0, zeros, zeros > 0, zeros, zeros, zeros - 1, room, zeros)
        start = max(0, min(prompt_length, length - self.picture_length - 1) - 1)  # one before whatever is counted
        ids_BT = input_ids[:, start:]
        inside_BT = self.is_picture_token(ids_BT)
        follows_BT = torch.nn.functional.pad(inside_BT[:, :-1], (1, 0))  # whether a picture's token stands before
        closes_BT = (ids_BT == self.end_token_id) & follows_BT
        opens_BT = (ids_BT == self.break_token_id) & ~closes_BT
        position = inside_BT[:, -(self.picture_length + 2) :].flip(1).to(torch.int64).cumprod(1).sum(1)
        new = slice(prompt_length - start, None)
        words_BT = (~(inside_BT | closes_BT | opens_BT))[:, new]
        behind_text_BT = words_BT.flip(1).cumsum(1).flip(1) == 0
        return PictureState(
            in_picture=(position > 0) | opens_BT[:, -1],
            position=position,
            closed=closes_BT[:, -1],
            images=closes_BT[:, new].sum(1),
            words=words_BT.sum(1),
            last=input_ids[:, -1],
            room=room,
            opened_here=(opens_BT[:, new] & behind_text_BT).sum(1),
        )

    def advance(self, state: PictureState, tokens: torch.LongTensor) -> PictureState:
        """The state after one more id in each row; `tokens` is int64 `[B]`. Equal to `state` of the longer rows."""
        inside = self.is_picture_token(tokens)
        closed = (tokens == self.end_token_id) & (state.position > 0)
        opens = (tokens == self.break_token_id) & ~closed
        in_picture = inside | opens
        of_picture = in_picture | closed
        return PictureState(
            in_picture=in_picture,
            position=(state.position + 1) * inside,
            closed=closed,
            images=state.images + closed,
            words=state.words + ~of_picture,
            last=tokens,
            room=state.room - 1,
            opened_here=(state.opened_here + opens) * of_picture,
        )

    def next_in_picture(self, state: PictureState) -> torch.LongTensor:
        """int64 `[B]`: the one id that may come next inside a picture, -1 for any code; no meaning for rows in text."""
        return self._on(state.position.device, self.next_ids)[state.position.clamp(max=self.picture_length)]

    def awaits_code(self, state: PictureState) -> torch.Tensor:
        """bool `[B]`: rows in which a code comes next."""
        return state.in_picture & (self.next_in_picture(state) < 0)

    def kinds(self, state: PictureState, rules: DocumentRules) -> torch.LongTensor:
        """int64 `[B]`: which set of ids may come next (rows of `sets`)."""
        device, cost = state.position.device, self.picture_length + 2
        next_kinds = self._on(device, self.next_kinds)[state.position.clamp(max=self.picture_length)]
        if rules.mode == "text":
            outside = WORDS + 2
        elif rules.mode == "image":
            outside = torch.where(state.images > 0, ENDING, OPENING)
        else:
            may_open = state.room >= cost  # one that could not be closed is not begun
            if rules.max_images is not None:
                may_open = may_open & (state.images < rules.max_images)
            may_end: torch.Tensor | int = 2
            if rules.min_images or rules.image_positions:
                waits = state.images < rules.min_images
                if rules.image_positions:
                    waits = waits | (state.words < rules.image_positions[-1])
                may_end = ~(may_open & waits) * 2
            outside = may_end + (torch.full_like(next_kinds, WORDS) if rules.forced else may_open)
            due = self._due(state, rules, cost)
            if due is not None:
                outside = torch.where(due & may_open, OPENING, outside)
        return torch.where(state.in_picture, next_kinds, outside)

    def _due(self, state: PictureState, rules: DocumentRules, cost: int) -> torch.Tensor | None:
        """bool `[B]`: rows in which the rules want a picture now; `None` where they ask for none."""
        device, due = state.position.device, None
        if rules.min_images:  # with one more id of text the last of them would not fit
            owed = rules.min_images - state.images
            due = (owed > 0) & (state.room <= owed * cost)
        if rules.image_positions:
            places = self._on(device, rules.image_positions)
            placed = (places == state.words[:, None]).sum(1) > state.opened_here
            due = placed if due is None else due | placed
        if rules.image_after_token_ids:
            ends = torch.isin(state.last, self._on(device, rules.image_after_token_ids))
            follows = ends & (state.words > 0) & ~state.closed
            due = follows if due is None else due | follows
        return due

    def sets(self, vocab_size: int, device: torch.device) -> torch.Tensor:
        """bool `[kinds, V]`: the ids of each set; made once for each device."""
        key = (device, vocab_size)
        if key not in self._constants:
            sets = torch.zeros(FIRST_FIXED + len(self.fixed_ids), vocab_size, dtype=torch.bool)
            words = torch.ones(vocab_size, dtype=torch.bool)
            words[self.codes] = False
            words[[*self.reserved, self.break_token_id, *self.eos_token_ids]] = False
            sets[WORDS:OPENING] = words
            sets[[WORDS + 1, WORDS + 3, OPENING], self.break_token_id] = True
            for end in self.eos_token_ids:
                sets[[WORDS + 2, WORDS + 3, ENDING], end] = True
            if not self.eos_token_ids:  # then the budget ends the row
                sets[ENDING] = words
            sets[CODES, self.codes] = True
            for kind, fixed in enumerate(self.fixed_ids, start=FIRST_FIXED):
                sets[kind, fixed] = True
            self._constants[key] = sets.to(device)
        return self._constants[key]

    def masked(self, scores: torch.FloatTensor, kinds: torch.LongTensor) -> torch.FloatTensor:
        """Scores `[B, V]`, minus infinity for ids that are not in the row's set; `kinds`: `[B]`, as from `kinds`."""
        return torch.where(self.sets(scores.shape[-1], scores.device)[kinds], scores, float("-inf"))

    def check_rules(self, rules: DocumentRules) -> None:
        """Raises a `ValueError` if pictures are to follow ids that are no text, which none could ever do."""
        if not rules.image_after_token_ids:
            return
        words = self.sets(self.vocab_size, torch.device("cpu"))[WORDS]
        wrong = [i for i in rules.image_after_token_ids if not 0 <= i < self.vocab_size or not words[i]]
        if wrong:
            raise ValueError(
                f"image_after_token_ids hold {wrong}; expected ids of text in 0..{self.vocab_size - 1}, no codes and "
                "no special tokens (processor.sentence_end_token_ids() has those that end a sentence)."
            )

    def check_room(self, rules: DocumentRules, room: torch.Tensor | int, input_ids: torch.Tensor | None = None) -> None:
        """Whether the pictures that are asked for fit into `room` more ids behind `input_ids`, int64 `[B, T]`.

        Args:
            room: one number for all rows, or int64 `[B]`, or `[B * copies]` where rows are repeated (beams).
        Raises:
            ValueError: if they cannot, in any row.
        """
        count = 1 if rules.mode == "image" else rules.min_images
        if not count:
            return
        each = self.picture_length + 2
        needed = torch.tensor([count * each])
        room = torch.as_tensor(room, dtype=torch.int64).cpu().flatten()
        if input_ids is not None:  # one that is half-drawn in the prompt is the first of them
            state = self.state(input_ids)
            needed = needed - torch.where(state.in_picture, state.position + 1, 0).cpu()
        needed = needed.repeat_interleave(max(1, len(room) // len(needed)))
        room, needed = torch.broadcast_tensors(room, needed)
        worst = int((room - needed).argmin())
        if room[worst] < needed[worst]:
            asked = "generation_mode='image'" if rules.mode == "image" else f"min_new_images={rules.min_images}"
            codes = len(self.layout.positions)
            raise ValueError(
                f"{asked} needs room for {count} picture(s) of {codes} codes and what stands around: max_new_tokens="
                f"{int(needed[worst])}; got room for {int(room[worst])} (max_new_tokens or max_length, and the model's "
                "positions)."
            )

    def allowed(
        self, input_ids: torch.LongTensor, vocab_size: int, mode: str, prompt_length: int, max_length: int
    ) -> torch.Tensor:
        """Which ids may come next, read off the ids alone.

        Args:
            input_ids: int64 `[B, T]`, prompt and what was written so far.
            mode: as in `DocumentRules`.
            prompt_length, max_length: in tokens; a picture that could not be closed within `max_length` is not begun.
        Returns:
            bool `[B, V]`.
        """
        state = self.state(input_ids, prompt_length, max_length - input_ids.shape[1])
        return self.sets(vocab_size, input_ids.device)[self.kinds(state, DocumentRules(mode))]

    def last_pictures(self, sequences: torch.LongTensor) -> torch.LongTensor:
        """The codes of the last complete picture of each row of what `generate()` returns: int64 `[B, T]` -> `[B, N]`.

        Raises:
            ValueError: if a row has no complete picture (`<break>`, N codes, `<break>`, in the config's layout).
        """
        size, count, pictures = self.picture_length, len(self.layout.positions), []
        for row, ids in enumerate(sequences.tolist()):
            for end in (place for place in range(len(ids) - 1, size, -1) if ids[place] == self.end_token_id):
                codes = self.layout.read(ids[end - size : end]) if ids[end - size - 1] == self.break_token_id else None
                if codes is not None:
                    pictures.append(codes)
                    break
            else:
                what = f"<break>, {count} codes" + (" in their layout" if self.structure else "")
                own_end = self.end_token_id != self.break_token_id
                closing = f"the closing token {self.end_token_id}" if own_end else "<break>"
                raise ValueError(
                    f"Row {row} of the written ids has no complete picture ({what}, {closing}). Expected what "
                    "generate(generation_mode='image') returns; post_process_interleaved takes any document apart."
                )
        return torch.tensor(pictures, device=sequences.device)


class PictureReader:
    """The states of a growing batch: each call reads the ids that came since the last.

    `follows`: rows stay where they are and grow by one id a step, as in greedy decoding and sampling, so that only the
    last id is read. Beams and drafts move and repeat rows: then the whole is read off the ids each time.
    """

    def __init__(
        self,
        grammar: PictureGrammar,
        prompt_length: int,
        room: torch.Tensor | int,
        follows: bool,
        enforced: bool = True,
    ):
        """`room`: int64 `[B]` (or one number), tokens that may be written after the prompt. `enforced`: rows are held
        to the grammar; otherwise a picture may be left at any place."""
        self.grammar, self.prompt_length, self.room, self.follows = grammar, prompt_length, room, follows
        self.enforced = enforced
        self._ids: torch.LongTensor | None = None
        self._state: PictureState | None = None
        self._seen: tuple[int, list[int]] | None = None  # a length, and `host_positions` at it

    def __call__(self, input_ids: torch.LongTensor) -> PictureState:
        if input_ids is self._ids:
            return self._state
        grown = self._ids is not None and input_ids.shape[0] == self._ids.shape[0]
        if self.follows and grown and input_ids.shape[1] == self._ids.shape[1] + 1:
            self._state = self.grammar.advance(self._state, input_ids[:, -1])
        else:
            written = input_ids.shape[1] - self.prompt_length
            self._state = self.grammar.state(input_ids, self.prompt_length, self.room - written)
        self._ids = input_ids
        return self._state

    def host_positions(self, input_ids: torch.LongTensor) -> list[int]:
        """For decisions of the host: each row's position in its picture, -1 for a row in text.

        While all rows are inside pictures the next positions are known beforehand (the grammar leaves no choice), and
        the device is not asked.
        """
        length = input_ids.shape[1]
        if self._seen is not None and self._seen[0] == length and self.follows:
            return self._seen[1]
        if self.follows and self.enforced and self._seen is not None and self._seen[0] == length - 1:
            positions = self._seen[1]
            if min(positions) >= 0 and max(positions) < self.grammar.picture_length:
                self._seen = (length, [position + 1 for position in positions])
                return self._seen[1]
        state = self(input_ids)
        self._seen = (length, torch.where(state.in_picture, state.position, -1).tolist())
        return self._seen[1]


def as_ids(ids: torch.Tensor | None, name: str = "input_ids") -> torch.LongTensor | None:
    """Ids as int64, which all tables of ids are; int32 and the like, as `datasets` and numpy have them, are as good.

    Raises:
        ValueError: if they are no integers.
    """
    if ids is None or ids.dtype == torch.int64:
        return ids
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, token ids, got {ids.dtype}.")
    return ids.long()


def left_padded(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device | None = None, width: int = 0
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Rows of ids of any lengths as one batch, padded on the left: ids and mask, int64 `[R, T]`, T >= width."""
    longest = max(width, *map(len, rows))
    ids = [[pad] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


__all__ = [
    "GENERATION_MODES",
    "DocumentRules",
    "PictureGrammar",
    "PictureReader",
    "PictureState",
    "as_ids",
    "left_padded",
]
