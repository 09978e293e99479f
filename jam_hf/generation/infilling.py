"""Infilling: the prompt for documents with gaps, the grammar of what is written into them, and whole documents again.

The prompt is what CM3 makes of a document (gaps.py), and the first sentinel again; the model then writes
`span <end of span> <sentinel> span <end of span> ... <eos>`. It knows token ids only.

Shape suffixes: R rows of a batch, F places of all scripts one after the other, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from ..model.configuration_jam import JamConfig
from ..model.grammar_jam import left_padded
from ..model.modeling_jam import JamForCausalLM
from ..model.processing_jam import JamProcessor
from .gaps import MaskedDocument, ids_that_are_no_text, masked_documents


# What may stand at a place of a script where no single id must: any code; text; text or the end of the span.
CODE, TEXT, TEXT_OR_END = -1, -2, -3


class InfillLogitsProcessor(LogitsProcessor):
    """Lets each row write its spans in order and nothing else (grammar: see this file's head; ours [R]).

    Text spans have 1 to `max_text_tokens` ids; those in pictures have what stands at each of their places. All is read
    off the ids, so it holds for beams and several return sequences of each document. What other processors left without
    a score may be the only id that can follow; it is written nevertheless.
    """

    fills_gaps = True  # by which the model knows that no whole document is written

    def __init__(
        self,
        documents: Sequence[MaskedDocument],
        config: JamConfig,
        prompt_length: int,
        max_text_tokens: int,
        eos_token_id: int,
    ):
        self.documents, self.prompt_length, self.eos_token_id = documents, prompt_length, eos_token_id
        self.mask_token_id, self.mask_end_token_id = config.mask_token_id, config.mask_end_token_id
        self.codes = slice(config.image_token_range.start, config.image_token_range.stop)
        self.never_text = ids_that_are_no_text(config)
        texts = (TEXT, *(TEXT_OR_END,) * (max_text_tokens - 1))
        # One script a span: what may stand at each of its places, the end of the span last. They lie one after the
        # other.
        self.scripts = [
            [(*(texts if gap is None else gap), self.mask_end_token_id) for gap in document.gaps]
            for document in documents
        ]
        self._tables: dict[tuple[torch.device, int], tuple[torch.Tensor, ...]] = {}

    @property
    def max_new_tokens(self) -> int:
        """What the longest row needs: its scripts, the sentinels after the first, and `<eos>`."""
        return max(sum(map(len, scripts)) + len(scripts) for scripts in self.scripts)

    def _tables_on(self, device: torch.device, vocab_size: int) -> tuple[torch.Tensor, ...]:
        """Scripts `[F]`, where each begins `[D, S]`, how many there are `[D]`, and ids by kind of place, bool `[3,
        V]`.
        """
        key = (device, vocab_size)
        if key not in self._tables:
            counts = [len(scripts) for scripts in self.scripts]
            starts = torch.zeros(len(counts), max(counts), dtype=torch.int64)
            places: list[int] = []
            for row, scripts in enumerate(self.scripts):
                for column, script in enumerate(scripts):
                    starts[row, column] = len(places)
                    places += script
            kinds = torch.zeros(3, vocab_size, dtype=torch.bool)
            kinds[0, self.codes] = True
            kinds[1:] = ~kinds[0]
            kinds[1:, self.never_text] = False
            kinds[2, self.mask_end_token_id] = True
            self._tables[key] = tuple(t.to(device) for t in (torch.tensor(places), starts, torch.tensor(counts), kinds))
        return self._tables[key]

    def allowed(self, input_ids: torch.LongTensor, vocab_size: int) -> torch.Tensor:
        """Which ids may come next: int64 `[R, T]`, R a multiple of the documents, to bool `[R, V]`."""
        rows, documents = input_ids.shape[0], len(self.documents)
        if rows % documents or input_ids.shape[1] < self.prompt_length:
            raise ValueError(
                f"These logits_processor and input_ids do not belong together: expected rows of {documents} "
                f"document(s) and at least {self.prompt_length} ids, got {list(input_ids.shape)}. Call "
                "generate(**infill) with nothing taken out."
            )
        places_F, starts, counts, kinds = self._tables_on(input_ids.device, vocab_size)
        document_R = torch.arange(rows, device=input_ids.device) // (rows // documents)
        written = input_ids[:, self.prompt_length :]
        ends = written == self.mask_end_token_id
        span_R = ends.sum(1)
        finished_R = span_R >= counts[document_R]
        position_R = torch.full_like(span_R, written.shape[1])
        if written.shape[1]:
            behind_R = (ends * torch.arange(1, written.shape[1] + 1, device=ends.device)).amax(1)
            position_R = position_R - torch.where(span_R > 0, behind_R + 1, 0)  # behind the next sentinel
        place_R = starts[document_R, span_R.clamp(max=starts.shape[1] - 1)] + position_R
        next_R = places_F[place_R.clamp(0, len(places_F) - 1)]
        next_R = torch.where(position_R < 0, self.mask_token_id + span_R, next_R)
        next_R1 = torch.where(finished_R, self.eos_token_id, next_R)[:, None]
        one_RV = torch.arange(vocab_size, device=input_ids.device) == next_R1
        return torch.where(next_R1 < 0, kinds[(-1 - next_R1[:, 0]).clamp(min=0)], one_RV)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        allowed = self.allowed(input_ids, scores.shape[-1])
        scores = scores.masked_fill(~allowed, float("-inf"))
        nothing_left_R1 = (scores == float("-inf")).all(-1, keepdim=True)
        return scores.masked_fill(nothing_left_R1 & allowed, 0.0)


class JamInfill(dict):
    """Documents with gaps, as keyword arguments of `generate`: `model.generate(**infill)`, with more of them where you
    like.

    The entries are `input_ids`, `attention_mask` (int64 `[B, T]`, padded on the left), `logits_processor` (the grammar
    of infills), `max_new_tokens` (what the gaps may need), and `generation_mode` and `guidance_scale`, both None: the
    grammar of whole documents knows no sentinels, and guidance has no unconditional branch for a part of a picture.

    Attributes:
        documents (`list[MaskedDocument]`): what the rows are made of.
    """

    def __init__(
        self, documents: Sequence[MaskedDocument], config: JamConfig, max_text_tokens: int, device: Any = None
    ):
        """Raises a `ValueError` if prompt and infills are longer than the model's positions."""
        self.documents, self.config = list(documents), config
        prompts = [[*document.ids, config.mask_token_id] for document in self.documents]
        length = max(map(len, prompts))
        eos_token_id = self.documents[0].ids[-1]
        processor = InfillLogitsProcessor(self.documents, config, length, max_text_tokens, eos_token_id)
        needed, room = length + processor.max_new_tokens, config.max_position_embeddings
        if needed > room:
            raise ValueError(
                f"infill: {length} ids of the longest document and up to {processor.max_new_tokens} for the gaps are "
                f"more than the {room} positions of the model. Lower max_text_tokens (now {max_text_tokens} for each "
                "gap in text), or shorten the documents."
            )
        pad = eos_token_id if config.pad_token_id is None else config.pad_token_id
        input_ids, attention_mask = left_padded(prompts, pad, device)
        super().__init__(
            input_ids=input_ids,
            attention_mask=attention_mask,
            logits_processor=LogitsProcessorList([processor]),
            max_new_tokens=processor.max_new_tokens,
            generation_mode=None,
            guidance_scale=None,
        )

    def restore(self, generated: Any) -> list[list[int]]:
        """The documents with their gaps filled, in ids, from `<s>` to `<eos>`; what was no gap is as it was.

        Args:
            generated: int64 `[R, T]` as `generate(**infill)` returns it, or its output object; R is a multiple of the
                documents where there are several return sequences.
        Raises:
            ValueError: if the rows do not begin with this infill's prompt, or do not hold its spans.
        """
        sequences = torch.as_tensor(getattr(generated, "sequences", generated)).cpu()
        prompt = self["input_ids"].cpu()
        copies, rest = divmod(len(sequences), len(prompt)) if sequences.ndim == 2 else (0, 0)
        length = prompt.shape[1]
        if not copies or rest or not torch.equal(sequences[:, :length], prompt.repeat_interleave(copies, 0)):
            raise ValueError(
                f"Expected what generate(**infill) of this infill returned: {len(prompt)} row(s), or a multiple, that "
                f"begin with its prompt of {length} ids; got {list(sequences.shape)}."
            )
        written = sequences[:, length:].tolist()
        return [self._restored(row, ids, self.documents[row // copies]) for row, ids in enumerate(written)]

    def _restored(self, row: int, written: list[int], document: MaskedDocument) -> list[int]:
        first = self.config.mask_token_id
        spans: list[list[int]] = []
        for index, gap in enumerate(document.gaps):
            if index:
                if written[:1] != [first + index]:
                    raise ValueError(
                        f"Row {row} does not go on with sentinel {index}. Call generate(**infill) as it is."
                    )
                written = written[1:]
            if self.config.mask_end_token_id not in written:
                raise ValueError(
                    f"Row {row} ends before span {index + 1} of {len(document.gaps)} does. Let generate write the "
                    f"{self['max_new_tokens']} tokens that the gaps may need."
                )
            end = written.index(self.config.mask_end_token_id)
            span, written = written[:end], written[end + 1 :]
            if not self._fits(span, gap):
                what = "text" if gap is None else f"the {len(gap)} ids that stand in this place of the picture"
                raise ValueError(f"Row {row}: span {index + 1} is not {what}. Call generate(**infill) as it is.")
            spans.append(span)
        ids: list[int] = []
        for token in document.ids:
            ids += spans[token - first] if 0 <= token - first < len(spans) else [token]
        return ids

    def _fits(self, span: list[int], gap: tuple[int, ...] | None) -> bool:
        codes = self.config.image_token_range
        if gap is None:
            never = ids_that_are_no_text(self.config)
            return bool(span) and not any(token in codes or token in never for token in span)
        return len(span) == len(gap) and all(
            token in codes if place < 0 else token == place for token, place in zip(span, gap)
        )


def infill(
    processor: JamProcessor,
    text: str | Sequence[str],
    images: Sequence[Any] | None = None,
    image_masks: Sequence[Any] | None = None,
    *,
    model: JamForCausalLM,
    max_text_tokens: int = 64,
) -> JamInfill:
    """`processor.infill`: documents with gaps to what `generate` needs to fill them:
    `model.generate(**processor.infill(...))`.

    Args:
        text (`str` or `list[str]`): documents; `<mask>` (the tokenizer's name of `config.mask_token_id`) marks each gap
            in the text, and `<image>` the place of each picture. A mark stands for whole tokens, which in most
            tokenizers bring the space before a word along: `"a small<mask> circle"`.
        images: for one document a list with each of its pictures, in order, for several a list of such lists. A picture
            is what the image processor takes, or its codes, int64 `[N]`, as ids. `None` is a picture that is missing.
        image_masks: beside `images`, which codes of each picture are missing, `None` for none: a list of spans
            `(start, end)` of codes in reading order and rectangles `(left, upper, right, lower)` in columns and rows of
            codes, ends exclusive; or bool `[G, G]`. Codes that follow one another in reading order are one gap.
        model: the JAM that will fill the gaps; it encodes the pictures.
        max_text_tokens (`int`, defaults to 64): the most that is written into each gap in text.
    Returns:
        [`JamInfill`]: keyword arguments of `generate`, the grammar of infills among them. The model fills gaps as it
        was
        trained to: one that saw no CM3 objective has no idea of them.
    Raises:
        ValueError: if marks, pictures and masks do not fit each other, a region is empty, overlaps another or is not
            inside the grid, there is no gap, or there are more than sentinels or than positions allow.
    """
    if isinstance(max_text_tokens, bool) or not isinstance(max_text_tokens, int) or max_text_tokens < 1:
        raise ValueError(f"infill: max_text_tokens must be an integer of at least 1, got {max_text_tokens!r}.")
    documents = masked_documents(processor, model, text, images, image_masks)
    return JamInfill(documents, model.config, max_text_tokens, model.device)


def post_process_infill(
    processor: JamProcessor, generated: Any, infill: JamInfill, model: JamForCausalLM, skip_special_tokens: bool = True
) -> list[list[dict[str, Any]]]:
    """`processor.post_process_infill`: filled documents as ordered segments, see `post_process_interleaved`.

    `infill.restore` has them as ids.

    Args:
        generated: int64 `[R, T]` as `generate(**infill)` returns it, or its output object.
        infill: what `infill(...)` returned for them.
    Raises:
        ValueError: if these are not the spans of this infill.
    """
    return processor.segments(infill.restore(generated), model, skip_special_tokens)


__all__ = ["InfillLogitsProcessor", "JamInfill", "infill", "post_process_infill"]
