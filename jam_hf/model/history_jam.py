"""Processors that look back see the history of their own modality: text that of text, codes that of codes.

transformers' `no_repeat_ngram_size`, `repetition_penalty` and their like count ids of the whole document. In a picture
the same few codes stand side by side a thousand times, so they would forbid what a picture is made of, and a picture
would change what may be written. Here each of them reads the ids of its modality alone and touches no scores but those
of its modality. They are transformers' own; it knows nothing of models or loops.

Shape suffixes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    WatermarkLogitsProcessor,
)

from .call_settings_jam import JamCallSettings
from .grammar_jam import PictureReader


# Of transformers' processors, those that read which ids stand before. The others read scores, or numbers of ids.
SEQUENCES = (SequenceBiasLogitsProcessor, NoBadWordsLogitsProcessor)
OF_PROMPT = (EncoderRepetitionPenaltyLogitsProcessor, EncoderNoRepeatNGramLogitsProcessor)
LOOKS_BACK = (
    RepetitionPenaltyLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    WatermarkLogitsProcessor,
    *OF_PROMPT,
    *SEQUENCES,
)


class HistoryLogitsProcessor(LogitsProcessor):
    """One of transformers' processors over the history of one modality, row by row.

    A row's history are its ids of that modality in order, without padding and as if what lies between were not there;
    the scores of all other ids are left as they are. Of text: what is no code, no placeholder and no mark of a picture.
    """

    def __init__(
        self,
        stock: LogitsProcessor,
        reader: PictureReader,
        prompt_mask: torch.Tensor | None = None,
        prompt_ids: torch.LongTensor | None = None,
        codes: bool = False,
    ):
        """`prompt_mask`: `[B, T]`, 0 for padding of the prompt's ids. `prompt_ids`: int64 `[P, T]`, for processors that
        go by the prompt; B is a multiple of P. `codes`: whether it is for codes; then `stock` counts them from 0."""
        self.stock, self.reader, self.prompt_mask, self.codes = stock, reader, prompt_mask, codes
        self.prompt_ids = prompt_ids if isinstance(stock, OF_PROMPT) else None
        self._of_prompt: dict[int, LogitsProcessor] = {}
        self._columns: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        grammar, processed = self.reader.grammar, scores.clone()
        if self.codes:
            columns = slice(grammar.first_code, grammar.last_code + 1)
            for row in self._rows(input_ids, in_pictures=True):
                ids = input_ids[row]
                history = ids[(ids >= grammar.first_code) & (ids <= grammar.last_code)] - grammar.first_code
                processed[row : row + 1, columns] = self.stock(history[None], scores[row : row + 1, columns])
            return processed
        for row in self._rows(input_ids, in_pictures=False):
            stock, passed_over = self._for_row(row, input_ids.shape[0])
            history = self._text(input_ids[row], row, passed_over)
            processed[row : row + 1] = stock(history[None], scores[row : row + 1])
        if self._columns is None or self._columns.shape[0] != scores.shape[-1]:
            self._columns = grammar.of_pictures(torch.arange(scores.shape[-1], device=scores.device))
        return torch.where(self._columns, scores, processed)

    def _rows(self, input_ids: torch.LongTensor, in_pictures: bool) -> list[int]:
        """Rows in which an id of the modality may come next; all where nothing holds rows to the grammar."""
        positions = self.reader.host_positions(input_ids) if self.reader.enforced else None
        return [row for row in range(len(input_ids)) if positions is None or (positions[row] >= 0) == in_pictures]

    def _text(self, ids: torch.LongTensor, row: int, passed_over: int = 0) -> torch.LongTensor:
        """int64 `[T]` -> the ids of text among them, but for the first `passed_over` of T."""
        kept = ~self.reader.grammar.of_pictures(ids)
        kept[:passed_over] = False
        if self.prompt_mask is not None:
            mask = self.prompt_mask[row, : len(ids)] != 0
            kept[: len(mask)] &= mask
        return ids[kept]

    def _for_row(self, row: int, rows: int) -> tuple[LogitsProcessor, int]:
        """What processes this row, and how many of the document's first ids it passes over."""
        stock = self.stock
        if isinstance(stock, RepetitionPenaltyLogitsProcessor):
            ignored = stock.prompt_ignore_length  # a user's own number; or padding by row, which is no history here
            return RepetitionPenaltyLogitsProcessor(stock.penalty), ignored if isinstance(ignored, int) else 0
        if self.prompt_ids is None:
            return stock, 0
        prompt = row * len(self.prompt_ids) // rows
        if prompt not in self._of_prompt:
            ids = self._text(self.prompt_ids[prompt], row)[None]
            if isinstance(stock, EncoderRepetitionPenaltyLogitsProcessor):
                made = EncoderRepetitionPenaltyLogitsProcessor(1 / stock.penalty, ids)
            else:
                made = EncoderNoRepeatNGramLogitsProcessor(stock.ngram_size, ids)
            self._of_prompt[prompt] = made
        return self._of_prompt[prompt], 0


def look_back_by_modality(
    processors: LogitsProcessorList,
    settings: JamCallSettings,
    reader: PictureReader,
    prompt_mask: torch.Tensor | None,
    prompt_ids: torch.LongTensor | None,
) -> LogitsProcessorList:
    """Those of `processors` that look back, each in its place over the history of text; in front those of codes that
    the call asks for. Processors of a user's own classes see the document as it is.

    Raises:
        ValueError: on a watermark that counts every step (SynthID) where pictures may come.
    """
    found = LogitsProcessorList(HistoryLogitsProcessor(made, reader, codes=True) for made in settings.image_history())
    of_text = (reader, prompt_mask, prompt_ids)
    for processor in processors:
        if type(processor) is SynthIDTextWatermarkLogitsProcessor and settings.generation_mode != "text":
            raise ValueError(
                "SynthIDTextWatermarkingConfig marks text and goes by every step, those inside pictures included. Use "
                "it with generation_mode='text', or WatermarkingConfig, which leaves pictures alone."
            )
        if type(processor) not in LOOKS_BACK:
            found.append(processor)
        elif type(processor) in SEQUENCES:
            found += _sequences_by_modality(processor, of_text)
        else:
            found.append(HistoryLogitsProcessor(processor, *of_text))
    return found


def _sequences_by_modality(processor: SequenceBiasLogitsProcessor, of_text: tuple[Any, ...]) -> list[LogitsProcessor]:
    """Sequences of text look back over text; those that name codes or marks of pictures hold where they stand."""
    grammar = of_text[0].grammar
    text: dict[tuple[int, ...], float] = {}
    others: dict[tuple[int, ...], float] = {}
    for sequence, bias in processor.sequence_bias.items():
        names_pictures = bool(grammar.of_pictures(torch.tensor(sequence)).any())
        (others if names_pictures else text)[tuple(sequence)] = bias
    made: list[LogitsProcessor] = []
    if text:
        made.append(HistoryLogitsProcessor(SequenceBiasLogitsProcessor(text), *of_text))
    if others:
        made.append(SequenceBiasLogitsProcessor(others))
    return made


__all__ = ["HistoryLogitsProcessor", "look_back_by_modality"]
