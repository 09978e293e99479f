"""Where sentences end, in ids: pictures can be asked for behind each of them."""

from __future__ import annotations

from typing import Any


SENTENCE_ENDS = (".", "!", "?", "…", "。", "！", "？")
CLOSING_MARKS = " \n\"')]»”’」』"


def sentence_end_token_ids(processor: Any) -> list[int]:
    """`processor.sentence_end_token_ids`: ids whose text ends a sentence, for `generate(image_after_token_ids=...)`.

    What ends in a full stop ends a sentence here, an abbreviation too. The whole vocabulary is read for it.
    """
    ids = sorted(set(range(len(processor.tokenizer))) - set(processor.tokenizer.all_special_ids))
    texts = processor.tokenizer.batch_decode([[i] for i in ids])
    return [i for i, text in zip(ids, texts) if text.rstrip(CLOSING_MARKS).endswith(SENTENCE_ENDS)]


__all__ = ["sentence_end_token_ids"]
