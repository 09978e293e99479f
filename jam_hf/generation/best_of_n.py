"""N best: documents put together from segments, with several candidates for each picture, of which a reranker keeps
one.

A segment is a call like any other (`JamGenerationMixin.run_call`): text until a row opens a picture, then the
candidates of all rows in one batch, and so on. How ids are chosen within a segment is unknown here, and how pictures
are compared (rerankers.py).

Shapes: B rows, T positions, C candidates, N codes a picture.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.configuration_utils import GenerationMode

from ..model.calls_jam import JamCall
from ..model.grammar_jam import PictureGrammar
from ..model.modeling_jam import JamForCausalLM
from .events import padding_id
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
UNSUPPORTED_ARGUMENTS = ("inputs_embeds", "past_key_values", "position_ids")
# Of a call, what its segments are given too, and what transformers prepares for a loop that is not theirs.
PASSED_ON = ("logits_processor", "synced_gpus", "tokenizer")
PREPARED = (
    *("logits_processor", "stopping_criteria", "attention_mask", "position_ids", "past_key_values"),
    *("use_cache", "logits_to_keep"),
)


@dataclass
class PictureSlot:
    """One picture of a document and what it was chosen from.

    row (`int`), start (`int`): `sequences[row, start]` is its opening token. codes (int64 `[C, N]`): the candidates'
    image ids.
    scores (float32 `[C]`): the reranker's. chosen (`int`): the candidate that the document has.
    """

    row: int
    start: int
    codes: torch.LongTensor
    scores: torch.FloatTensor
    chosen: int


@dataclass
class JamRerankedOutput(GenerateDecoderOnlyOutput):
    """`sequences` (int64 `[B, T]`), and `picture_slots` (`list[PictureSlot]`) in the order in which they were
    filled.
    """

    picture_slots: list[PictureSlot] | None = None


class _SegmentEnd(StoppingCriteria):
    """Ends rows where `ends` says so and where the user's criteria do.

    lengths (int64 `[B]`): where each row ended, 0 where it did not. by_user (bool `[B]`): whether the user's criteria
    did it.
    """

    def __init__(
        self, ends: Callable[[torch.LongTensor], torch.BoolTensor], users: list[StoppingCriteria] | None, rows: int
    ):
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

    def __init__(
        self,
        model: JamForCausalLM,
        call: JamCall,
        input_ids: torch.LongTensor,
        config: GenerationConfig,
        kwargs: dict[str, Any],
    ):
        """`input_ids`, `config`, `kwargs`: as transformers gives them to a loop; `config` is complete."""
        self.model, self.call, self.config = model, call, config
        self.pad = padding_id({}, None, config) or 0
        self.grammar = PictureGrammar(model.config)
        self.criteria = call.arguments.get("stopping_criteria")
        self.allowed_fn = call.arguments.get("prefix_allowed_tokens_fn")
        self.prompt, mask, count = input_ids, kwargs.get("attention_mask"), len(input_ids)
        self.mask = torch.ones_like(input_ids) if mask is None else mask
        others = {name: value for name, value in kwargs.items() if name not in PREPARED}
        self.of_rows = {n: v for n, v in others.items() if torch.is_tensor(v) and v.ndim > 1 and len(v) == count}
        self.shared = {name: call.arguments[name] for name in PASSED_ON if name in call.arguments}
        self.shared |= {name: value for name, value in others.items() if name not in self.of_rows}
        self.min_length, self.max_length = config.min_length or 0, config.max_length
        self.rows = list(self.prompt)
        self.ended = [False] * count

    def check_room(self) -> None:
        """As `generate()` does for a document in one piece."""
        room = self.model.config.max_position_embeddings - self.mask.sum(1)
        room = room.clamp(max=self.max_length - self.prompt.shape[1])
        self.grammar.check_room(self.call.settings.rules(), room, self.prompt)

    def _segment(
        self,
        rows: list[int],
        ids: torch.LongTensor,
        mask: torch.Tensor,
        budget: int,
        ends: Callable[[torch.LongTensor], torch.BoolTensor],
    ) -> tuple[list[torch.LongTensor], _SegmentEnd]:
        """At most `budget` ids after each of `ids` `[R, T]`, R of int64 `[t]`, and how they ended."""
        config = copy.deepcopy(self.config)
        config.max_length, config.max_new_tokens = None, budget
        config.min_length, config.min_new_tokens = None, max(0, min(self.min_length - ids.shape[1], budget))
        config.num_return_sequences, config.return_dict_in_generate = 1, False
        end = _SegmentEnd(ends, self.criteria, len(ids))
        arguments = {
            "input_ids": ids,
            "attention_mask": mask,
            "stopping_criteria": StoppingCriteriaList([end]),
            **self.shared,
        }
        arguments |= {name: value[rows] for name, value in self.of_rows.items()}
        if self.allowed_fn is not None:
            arguments["prefix_allowed_tokens_fn"] = lambda place, row_ids: self.allowed_fn(rows[place], row_ids)
        settings, negative = self.call.settings, self.call.settings.negative_prompt_ids
        if negative is not None:
            own = [negative[row * len(negative) // len(self.rows)] for row in rows]
            settings = replace(settings, negative_prompt_ids=own)
        # What counts from the prompt counts from the document's.
        segment = JamCall(settings, config, arguments, prompt_length=self.prompt.shape[1])
        sequences = self.model.run_call(segment)
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

        Rows go together that have written equally much: what counts tokens (budgets, a least length) then holds for
        all.
        """
        lengths = {row: len(self.rows[row]) for row in rows}
        for length in sorted(set(lengths.values())):
            group = [row for row in rows if lengths[row] == length]
            ids, mask = (
                torch.stack([self.rows[row] for row in group]),
                torch.stack([self._whole_mask(row) for row in group]),
            )
            written, end = self._segment(group, ids, mask, self.max_length - length, self._opens_picture)
            for row, new, ended_at, by_user in zip(group, written, end.lengths.tolist(), end.by_user.tolist()):
                self.ended[row] = by_user or not ended_at
                self._append(row, new)

    def draw(self, rows: list[int], count: int, reranker: Reranker, tokenizer: Any) -> list[PictureSlot]:
        """`count` candidates for the picture that each row stands in, of all rows in one batch; rows go on from the
        best.
        """
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
            scores = checked_scores(
                reranker, PictureCandidates(self.model, sequences[0, : start + 1][kept], codes, tokenizer)
            )
            best = int(scores.argmax())
            self._append(row, drawn[best])
            self.ended[row] |= bool(end.by_user[of_row][best])
            slots.append(PictureSlot(row, start, codes, scores, best))
        return slots


@dataclass
class BestOfN:
    """For each picture of each row C candidates, of which the one with the highest score is kept:

        model.generate(**inputs, custom_generate=BestOfN(4, reranker), do_sample=True)

    or short `generate(..., num_candidates=4, reranker=...)`. The document goes on from the picture that is kept.
    Pictures of all rows are drawn in one batch of B * C; rows that have written equally much write text together. A row
    writes what it would write alone, and budgets hold over the whole document. Each segment reads the document so far
    anew. `generate()` then returns int64 `[B, T]`, padded on the right, or with `return_dict_in_generate=True` a
    [`JamRerankedOutput`]; where a `streamer` is given, it gets what is decided, a segment at a time. `tokenizer=` is
    for rerankers that read the text before a picture, as CLIP does.

    Args:
        num_candidates (`int`): C, at least 1; 1 is plain `generate()`.
        reranker (*optional*): "likelihood" (the default), the folder or Hub id of a CLIP checkpoint (loaded at each
            call; a [`CLIPReranker`] is loaded once), or a callable, see [`Reranker`].
    Raises:
        ValueError: if `num_candidates` is no positive number; at the call, where candidates could not differ or the
            settings have no meaning over segments, or the reranker does not return one number for each candidate.
    """

    num_candidates: int
    reranker: Reranker | str | None = None
    takes_the_call: ClassVar[bool] = True

    def __post_init__(self) -> None:
        count = self.num_candidates
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            needs = "reranker=... needs num_candidates=..., " if count is None else "num_candidates must be "
            raise ValueError(f"{needs}a whole number of at least 1; got {count!r}.")

    def __call__(self, model: JamForCausalLM, call: JamCall) -> torch.LongTensor | JamRerankedOutput:
        reranker = reranker_of(self.reranker, model.device)
        if self.num_candidates == 1:
            return model.run_call(replace(call, arguments={**call.arguments, "custom_generate": None}))
        for name in UNSUPPORTED_ARGUMENTS:
            if call.arguments.get(name) is not None:
                raise ValueError(
                    f"num_candidates={self.num_candidates} cannot be combined with {name}=... Leave it out."
                )
        if call.arguments.get("input_ids") is None:
            raise ValueError("num_candidates needs input_ids: pass the processor's output.")

        def loop(
            model: JamForCausalLM, input_ids: torch.LongTensor, generation_config: GenerationConfig, **kwargs: Any
        ) -> torch.LongTensor | JamRerankedOutput:
            self._check(generation_config, call)
            return self._written(_Documents(model, call, input_ids, generation_config, kwargs), reranker)

        return model.run_call(replace(call, arguments={**call.arguments, "custom_generate": loop}, in_parts=True))

    def _check(self, config: GenerationConfig, call: JamCall) -> None:
        asked, mode = (
            f"num_candidates={self.num_candidates}",
            config.get_generation_mode(call.arguments.get("assistant_model")),
        )
        if mode == GenerationMode.GREEDY_SEARCH:
            raise ValueError(f"{asked} needs do_sample=True: without it all candidates are equal.")
        if mode != GenerationMode.SAMPLE:
            raise ValueError(
                f"{asked} draws candidates by sampling; it cannot be combined with {mode.value.replace('_', ' ')}. Set "
                "num_beams=1 and leave assistant_model, prompt_lookup_num_tokens and such out."
            )
        if call.settings.generation_mode not in ("interleaved", "image"):
            raise ValueError(
                f"{asked} needs generation_mode='interleaved' or 'image', where pictures are written; got "
                f"{call.settings.generation_mode!r}."
            )
        neutral = {"encoder_repetition_penalty": (1.0,), "encoder_no_repeat_ngram_size": (0,)}
        for name in UNSUPPORTED_SETTINGS:
            value = getattr(config, name, None)
            if value is not None and value is not False and value not in neutral.get(name, ()):
                raise ValueError(f"{asked} cannot be combined with {name}={value}. Leave it out.")

    def _written(self, documents: _Documents, reranker: Reranker) -> torch.LongTensor | JamRerankedOutput:
        documents.check_room()
        arguments, slots = documents.call.arguments, []
        while not all(documents.ended):
            before = [len(row) for row in documents.rows]
            active = [row for row, ended in enumerate(documents.ended) if not ended]
            missing = {row: documents.missing(row) for row in active}
            drawing = [r for r in active if missing[r] and len(documents.rows[r]) + missing[r] <= documents.max_length]
            if drawing:
                slots += documents.draw(drawing, self.num_candidates, reranker, arguments.get("tokenizer"))
            if writing := [
                row for row in active if row not in drawing
            ]:  # also what is left of a picture that has no room
                documents.write_text(writing)
            new = [row[length:] for row, length in zip(documents.rows, before)]
            if arguments.get("streamer") is not None:  # transformers has given it the prompt
                arguments["streamer"].put(torch.nn.utils.rnn.pad_sequence(new, True, documents.pad).cpu())
        if arguments.get("streamer") is not None:
            arguments["streamer"].end()
        sequences = torch.nn.utils.rnn.pad_sequence(documents.rows, batch_first=True, padding_value=documents.pad)
        if not documents.config.return_dict_in_generate:
            return sequences
        return JamRerankedOutput(sequences=sequences, picture_slots=slots)


def generate_best_pictures(
    model: JamForCausalLM,
    num_candidates: int | None,
    reranker: Reranker | str | None,
    generation_config: GenerationConfig | None = None,
    **kwargs: Any,
) -> torch.LongTensor | JamRerankedOutput:
    """`model.generate(custom_generate=BestOfN(num_candidates, reranker), ...)`, by its older name."""
    return model.generate(
        generation_config=generation_config, custom_generate=BestOfN(num_candidates, reranker), **kwargs
    )


__all__ = ["BestOfN", "JamRerankedOutput", "PictureSlot", "generate_best_pictures"]
