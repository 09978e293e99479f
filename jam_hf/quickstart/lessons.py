"""What both pairs of parents are trained with."""

from __future__ import annotations

from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict

from ..data.collator import JamDataCollator
from ..data.sequences import encode_documents


MAX_POSITIONS = 512
# How much louder than other rows the head start of image codes is (training/embeddings.py).
CODE_STD = 1.5


class Lesson(NamedTuple):
    """What a parent is trained with: the model as it is drawn, its documents, their collator, and its tokenizer."""

    model: Any
    documents: Dataset
    collator: JamDataCollator
    tokenizer: Any


def encoded(splits: DatasetDict, description: str, **settings: Any) -> DatasetDict:
    """All splits but those of unseen captions, which are there to be drawn."""
    return DatasetDict(
        {
            split: encode_documents(dataset, description=f"encoding {description} {split}", **settings)
            for split, dataset in splits.items()
            if not split.startswith("unseen")
        }
    )
