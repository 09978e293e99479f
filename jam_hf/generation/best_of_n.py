"""N best: documents put together from segments, with several candidates for each picture, of which a reranker keeps one.

A segment is what the ordinary `generate()` writes: text until a row opens a picture, then the candidates of all rows in one
batch, and so on. This file does not know how ids are chosen within a segment, nor how pictures are compared (rerankers.py).

Shapes: B rows, T positions, C candidates, N codes a picture.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.configuration_utils import GenerationMode

from ..model.call_settings_jam import document_rules, end_ids
from ..model.grammar_jam import PictureGrammar
from ..model.modeling_jam import JamForCausalLM
from .rerankers import PictureCandidates, Reranker, checked_scores, reranker_of


# What counts from the prompt, or is kept step by step, and has no meaning over segments.
UNSUPPORTED_SETTINGS = (
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
    "max_time",
    "token_healing",
    "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size",
)
UNSUPPORTED_ARGUMENTS = ("inputs_embeds", "past_key_values", "position_ids", "custom_generate")


@dataclass
class PictureSlot:
    """One picture of a document and what it was chosen from.

    row (`int`), start (`int`): `sequences[row, start]` is its opening token. codes (int64 `[C, N]`): the candidates' image ids.
    scores (float32 `[C]`): the reranker's. chosen (`int`): the candidate that the document has.
    """

    row: int
    start: int
    codes: torch.LongTensor
    scores: torch.FloatTensor
    chosen: int


@dataclass
class JamRerankedOutput(GenerateDecoderOnlyOutput):
    """`sequences` (int64 `[B, T]`), and `picture_slots` (`list[PictureSlot]`) in the order in which they were filled."""

    picture_slots: list[PictureSlot] | None = None


class _SegmentEnd(StoppingCriteria):
    """Ends rows where `ends` says so and where the user's criteria do.

    lengths (int64 `[B]`): where each row ended, 0 where it did not. by_user (bool `[B]`): whether the user's criteria did it.
    """

    def __init__(self, ends: Callable[[torch.LongTensor], torch.BoolTensor], users: list[StoppingCriteria] | None, rows: int):
        self.ends, self.users = ends, StoppingCriteriaList(users or [])
        self.lengths, self.by_user = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.bool)

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        by_user = self.users(input_ids, scores, **kwargs)
        done = by_user | self.ends(input_ids)
        running = self.lengths == 0
        self.by_user |= running & by_user.cpu()
        self.lengths[running & done.cpu()] = input_ids.shape[1]
        return done


class _Documents:
    """The rows of a batch, each as long as it is, and the segments that they grow by."""

    def __init__(self, model: JamForCausalLM, settings: GenerationConfig, kwargs: dict[str, Any]):
        """`settings` are complete; `kwargs` is everything else that was given to `generate()`."""
        self.model, self.settings = model, settings
        ends, pad = end_ids(settings.eos_token_id), settings.pad_token_id
        self.pad = pad if pad is not None else ends[0] if ends else 0  # as GenerationMixin has it
        self.grammar = PictureGrammar(model.config)
        self.criteria = kwargs.pop("stopping_criteria", None)
        self.allowed_fn = kwargs.pop("prefix_allowed_tokens_fn", None)
        input_ids, mask = kwargs.pop("input_ids"), kwargs.pop("attention_mask", None)
        if mask is None:
            prepared = copy.deepcopy(settings)
            model._prepare_special_tokens(prepared, False, device=input_ids.device)
            mask = model._prepare_attention_mask_for_generation(input_ids, prepared, {})
        repeats, count = settings.num_return_sequences or 1, len(input_ids)
        self.prompt = input_ids.repeat_interleave(repeats, dim=0)
        self.mask = mask.repeat_interleave(repeats, dim=0)
        # Such as negative_prompt_ids: they go with their rows.
        of_rows = {n: v for n, v in kwargs.items() if torch.is_tensor(v) and v.ndim > 1 and len(v) == count}
        self.of_rows = {name: value.repeat_interleave(repeats, dim=0) for name, value in of_rows.items()}
        self.kwargs = {name: value for name, value in kwargs.items() if name not in of_rows}
        self.min_length, self.max_length = settings.min_length or 0, settings.max_length
        if settings.min_new_tokens is not None:
            self.min_length = self.prompt.shape[1] + settings.min_new_tokens
        if settings.max_new_tokens is not None:
            self.max_length = self.prompt.shape[1] + settings.max_new_tokens
        self.rows = list(self.prompt)
        self.ended = [len(row) >= self.max_length for row in self.rows]

    def check_room(self) -> None:
        """As `generate()` does for a document in one piece."""
        room = self.model.config.max_position_embeddings - self.mask.sum(1)
        room = room.clamp(max=self.max_length - self.prompt.shape[1])
        self.grammar.check_room(document_rules(self.settings), room, self.prompt)

    def _segment(
        self,
        rows: list[int],
        ids: torch.LongTensor,
        mask: torch.Tensor,
        budget: int,
        ends: Callable[[torch.LongTensor], torch.BoolTensor],
    ) -> tuple[list[torch.LongTensor], _SegmentEnd]:
        """At most `budget` ids after each of `ids` `[R, T]`, R of int64 `[t]`, and how they ended."""
        settings = copy.deepcopy(self.settings)
        settings.max_length, settings.max_new_tokens = None, budget
        settings.min_length, settings.min_new_tokens = None, max(0, min(self.min_length - ids.shape[1], budget))
        settings.num_return_sequences, settings.return_dict_in_generate = 1, False
        settings.document_prompt_length = self.prompt.shape[1]  # what counts from the prompt counts from the document's
        end = _SegmentEnd(ends, self.criteria, len(ids))
        kwargs = {**self.kwargs, **{name: value[rows] for name, value in self.of_rows.items()}}
        if self.allowed_fn is not None:
            kwargs["prefix_allowed_tokens_fn"] = lambda place, row_ids: self.allowed_fn(rows[place], row_ids)
        sequences = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList([end]),
            **kwargs,
        )
        # Behind an <eos> stands padding, which never reaches further than the longest row of the segment.
        return [row[ids.shape[1] : length or None] for row, length in zip(sequences, end.lengths.tolist())], end

    def _whole_mask(self, row: int) -> torch.Tensor:
        return torch.nn.functional.pad(self.mask[row], (0, len(self.rows[row]) - self.mask.shape[1]), value=1)

    def _append(self, row: int, ids: torch.LongTensor) -> None:
        self.rows[row] = torch.cat((self.rows[row], ids))
        self.ended[row] |= len(self.rows[row]) >= self.max_length

    def _opens_picture(self, ids: torch.LongTensor) -> torch.BoolTensor:
        state = self.grammar.state(ids)
        return state.in_picture & (state.position == 0)

    def missing(self, row: int) -> int | None:
        """How many tokens the picture that the row stands in still needs, its closing token included; None in text."""
        state = self.grammar.state(self.rows[row][None])
        return self.grammar.picture_length + 1 - int(state.position) if bool(state.in_picture) else None

    def write_text(self, rows: list[int]) -> None:
        """Each row to its next picture's opening token, or to its end.

        Rows go together that have written equally much: what counts tokens (budgets, a least length) then holds for all.
        """
        lengths = {row: len(self.rows[row]) for row in rows}
        for length in sorted(set(lengths.values())):
            group = [row for row in rows if lengths[row] == length]
            ids, mask = torch.stack([self.rows[row] for row in group]), torch.stack([self._whole_mask(row) for row in group])
            written, end = self._segment(group, ids, mask, self.max_length - length, self._opens_picture)
            for row, new, ended_at, by_user in zip(group, written, end.lengths.tolist(), end.by_user.tolist()):
                self.ended[row] = by_user or not ended_at
                self._append(row, new)

    def draw(self, rows: list[int], count: int, reranker: Reranker, tokenizer: Any) -> list[PictureSlot]:
        """`count` candidates for the picture that each row stands in, of all rows in one batch; rows go on from the best."""
        needed = [self.missing(row) for row in rows]
        longest = max(len(self.rows[row]) for row in rows)
        padding = [longest - len(self.rows[row]) for row in rows]
        pad = torch.nn.functional.pad
        ids = torch.stack([pad(self.rows[row], (left, 0), value=self.pad) for row, left in zip(rows, padding)])
        mask = torch.stack([pad(self._whole_mask(row), (left, 0), value=0) for row, left in zip(rows, padding)])
        ends = (longest + torch.tensor(needed, device=ids.device)).repeat_interleave(count)
        ids, mask = ids.repeat_interleave(count, dim=0), mask.repeat_interleave(count, dim=0)
        expanded = [row for row in rows for _ in range(count)]
        room = self.grammar.picture_length + 2  # no row needs all of it, but "image" mode wants it from the start
        written, end = self._segment(expanded, ids, mask, room, lambda ids: ends <= ids.shape[1])
        slots = []
        for place, row in enumerate(rows):
            of_row = slice(place * count, (place + 1) * count)
            if min(map(len, written[of_row])) < needed[place]:  # the user's criteria ended the document in this picture
                self._append(row, written[of_row][0])
                self.ended[row] = True
                continue
            drawn = torch.stack(written[of_row])
            sequences = torch.cat((self.rows[row].expand(count, -1), drawn), 1)
            start = sequences.shape[1] - self.grammar.picture_length - 2
            kept = self._whole_mask(row)[: start + 1].bool()
            codes = self.grammar.last_pictures(sequences)
            scores = checked_scores(reranker, PictureCandidates(self.model, sequences[0, : start + 1][kept], codes, tokenizer))
            best = int(scores.argmax())
            self._append(row, drawn[best])
            self.ended[row] |= bool(end.by_user[of_row][best])
            slots.append(PictureSlot(row, start, codes, scores, best))
        return slots


def _check(settings: GenerationConfig, num_candidates: Any, kwargs: dict[str, Any]) -> None:
    mode = settings.get_generation_mode(kwargs.get("assistant_model"))
    if mode == GenerationMode.GREEDY_SEARCH:
        raise ValueError(f"num_candidates={num_candidates} needs do_sample=True: without it all candidates are equal.")
    if mode != GenerationMode.SAMPLE:
        raise ValueError(
            f"num_candidates={num_candidates} draws candidates by sampling; it cannot be combined with "
            f"{mode.value.replace('_', ' ')}. Set num_beams=1 and leave assistant_model, prompt_lookup_num_tokens and such out."
        )
    document_mode = getattr(settings, "generation_mode", None)
    if document_mode not in ("interleaved", "image"):
        raise ValueError(
            f"num_candidates={num_candidates} needs generation_mode='interleaved' or 'image', where pictures are written; got "
            f"{document_mode!r}."
        )
    neutral = {"encoder_repetition_penalty": (1.0,), "encoder_no_repeat_ngram_size": (0,)}
    for name in UNSUPPORTED_SETTINGS:
        value = getattr(settings, name, None)
        if value is not None and value is not False and value not in neutral.get(name, ()):
            raise ValueError(f"num_candidates={num_candidates} cannot be combined with {name}={value}. Leave it out.")
    for name in UNSUPPORTED_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise ValueError(f"num_candidates={num_candidates} cannot be combined with {name}=... Leave it out.")
    if kwargs.get("input_ids") is None:
        raise ValueError("num_candidates needs input_ids: pass the processor's output.")


def generate_best_pictures(
    model: JamForCausalLM,
    num_candidates: int | None,
    reranker: Reranker | str | None,
    generation_config: GenerationConfig | None = None,
    **kwargs: Any,
) -> torch.LongTensor | JamRerankedOutput:
    """What `generate(..., num_candidates=C, reranker=...)` does.

    For each picture of each row C candidates are drawn and the one with the highest score is kept; the document goes on from
    it. Pictures of all rows are drawn in one batch of B * C; rows that have written equally much write text together. A row
    writes what it would write alone, and budgets hold over the whole document. Each segment reads the document so far anew.

    Args:
        num_candidates (`int`): C, at least 1; 1 is plain `generate()`.
        reranker (*optional*): "likelihood" (the default), the folder or Hub id of a CLIP checkpoint (loaded at each call; a
            [`CLIPReranker`] is loaded once), or a callable, see [`Reranker`].
        tokenizer (*optional*): for rerankers that read the text before a picture, as CLIP does.
        kwargs: as for `generate()`. Where `streamer` is given, it gets what is decided, a segment at a time.
    Returns:
        int64 `[B, T]`, padded on the right, or with `return_dict_in_generate=True` a [`JamRerankedOutput`].
    Raises:
        ValueError: where candidates could not differ or the settings have no meaning over segments, if `num_candidates` is
            no positive number, or the reranker does not return one number for each candidate.
    """
    if not isinstance(num_candidates, int) or isinstance(num_candidates, bool) or num_candidates < 1:
        needs = "reranker=... needs num_candidates=..., " if num_candidates is None else "num_candidates must be "
        raise ValueError(f"{needs}a whole number of at least 1; got {num_candidates!r}.")
    reranker = reranker_of(reranker, model.device)
    if num_candidates == 1:
        return model.generate(generation_config=generation_config, **kwargs)
    settings, kwargs = model._prepare_generation_config(generation_config, **kwargs)
    _check(settings, num_candidates, kwargs)
    streamer, tokenizer = kwargs.pop("streamer", None), kwargs.get("tokenizer")
    documents, slots = _Documents(model, settings, kwargs), []
    documents.check_room()
    if streamer is not None:
        streamer.put(documents.prompt.cpu())
    while not all(documents.ended):
        before = [len(row) for row in documents.rows]
        active = [row for row, ended in enumerate(documents.ended) if not ended]
        missing = {row: documents.missing(row) for row in active}
        drawing = [r for r in active if missing[r] and len(documents.rows[r]) + missing[r] <= documents.max_length]
        if drawing:
            slots += documents.draw(drawing, num_candidates, reranker, tokenizer)
        if writing := [row for row in active if row not in drawing]:  # also what is left of a picture that has no room
            documents.write_text(writing)
        new = [row[length:] for row, length in zip(documents.rows, before)]
        if streamer is not None:
            streamer.put(torch.nn.utils.rnn.pad_sequence(new, batch_first=True, padding_value=documents.pad).cpu())
    if streamer is not None:
        streamer.end()
    sequences = torch.nn.utils.rnn.pad_sequence(documents.rows, batch_first=True, padding_value=documents.pad)
    if not settings.return_dict_in_generate:
        return sequences
    return JamRerankedOutput(sequences=sequences, picture_slots=slots)


__all__ = ["JamRerankedOutput", "PictureSlot", "generate_best_pictures"]
