"""The grammar, settings by modality and stop strings as what transformers' loops call at every step.

Where a row stands they read off a `PictureReader`, stop strings off its last id; they know no models, caches or loops.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StopStringCriteria

from .call_settings_jam import WARPER_CLASSES, JamCallSettings
from .grammar_jam import DocumentRules, PictureGrammar, PictureReader


class PictureGrammarLogitsProcessor(LogitsProcessor):
    """Sets the scores of ids that the grammar does not allow to minus infinity."""

    def __init__(self, reader: PictureReader, rules: DocumentRules):
        self.reader, self.rules = reader, rules
        self.last_scores: torch.FloatTensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        grammar = self.reader.grammar
        self.last_scores = grammar.masked(scores, grammar.kinds(self.reader(input_ids), self.rules))
        return self.last_scores


class PictureGrammarGuardLogitsProcessor(LogitsProcessor):
    """The last word is the grammar's: where the processors after it left a row none of its ids, its scores come back.

    `suppress_tokens`, `image_no_repeat_ngram_size` and `min_new_tokens` may forbid the one id that can follow (a
    closing `<break>`, an `<eos>`); without this the row would go on with id 0. What others made of minus infinity (a
    number, or none: `exponential_decay_length_penalty`) is minus infinity again.
    """

    def __init__(self, first: Any):
        """`first`: a processor that keeps the scores that it gave as `last_scores`."""
        self.first = first

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        allowed_scores = self.first.last_scores
        scores = scores.masked_fill(allowed_scores == float("-inf"), float("-inf"))
        empty_B1 = (scores == float("-inf")).all(-1, keepdim=True)
        return torch.where(empty_B1, allowed_scores, scores)


class PictureWarperLogitsProcessor(LogitsProcessor):
    """One setting by modality: `text` warps the scores of rows in text, `image` those of rows where a code comes next.

    Either may be None: no warping there. Codes are warped among themselves, so that top-k of 8,192 codes sorts no more.
    """

    def __init__(self, reader: PictureReader, text: LogitsProcessor | None, image: LogitsProcessor | None):
        self.reader, self.text, self.image = reader, text, image

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        grammar = self.reader.grammar
        for_codes = scores.clone()
        if self.image is not None:
            for_codes[:, grammar.codes] = self.image(input_ids, scores[:, grammar.codes])
        for_text = scores if self.text is None else self.text(input_ids, scores)
        return torch.where(grammar.awaits_code(self.reader(input_ids))[:, None], for_codes, for_text)


class TextStopStringCriteria(StoppingCriteria):
    """Stop strings of text, in one run of it: the names of codes and marks (":" in "<img:4>", ">" of "<break>") are
    none, nor is what a picture parts."""

    def __init__(self, stock: StopStringCriteria, grammar: PictureGrammar):
        self.stock, self.grammar = stock, grammar

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        # An id that no tokenizer has matches nothing: the stock criterion has a place for those.
        text_ids = input_ids.masked_fill(self.grammar.of_pictures(input_ids), torch.iinfo(torch.int32).max)
        return self.stock(text_ids, scores, **kwargs)


def warp_by_modality(
    processors: LogitsProcessorList, settings: JamCallSettings, num_beams: int, reader: PictureReader
) -> None:
    """Put `image_temperature` and so on beside transformers' own warpers, each where it stands or would stand."""
    place = next((p for p, each in enumerate(processors) if isinstance(each, WARPER_CLASSES)), len(processors))
    for stock, (is_set, image) in settings.image_warpers(num_beams).items():
        found = next((p for p, processor in enumerate(processors) if type(processor) is stock), None)
        if is_set:
            if found is None:
                processors.insert(place, PictureWarperLogitsProcessor(reader, None, image))
                found = place
            else:
                processors[found] = PictureWarperLogitsProcessor(reader, processors[found], image)
        if found is not None:
            place = found + 1


__all__ = [
    "PictureGrammarGuardLogitsProcessor",
    "PictureGrammarLogitsProcessor",
    "PictureWarperLogitsProcessor",
    "TextStopStringCriteria",
    "warp_by_modality",
]
