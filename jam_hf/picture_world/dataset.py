"""Picture world as `datasets.DatasetDict`s: texts, caption-image pairs, how-to dialogues.

Everything follows from the seed and the sizes; nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage

from .captions import caption
from .howto import howto
from .knowledge import document
from .world import Picture, render, sample_picture


@dataclass(frozen=True)
class PictureWorldSizes:
    """Numbers of documents. unseen: captions of held-out objects, and as many of held-out pairs."""

    texts: int = 12_000
    pairs: int = 18_000
    howtos: int = 3_000
    validation: int = 300
    unseen: int = 200

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"PictureWorldSizes: {name} must be at least 1, got {value}.")


PAIR_FEATURES = Features({"caption": Value("string"), "image": Image(), "picture": Value("string")})
# `messages` is JSON in the chat format: its parts have unlike keys, which a columnar file would fill up with nulls.
HOWTO_FEATURES = Features({"messages": Value("string"), "images": List(Image()), "pictures": List(Value("string"))})

# Shares of pictures with 1, 2, 3 and 4 objects among the training pairs: full pictures teach most (docs/log.md).
_OBJECT_SHARES = (0.1, 0.2, 0.3, 0.4)


def _num_objects(rng: np.random.Generator) -> int:
    return int(rng.choice(len(_OBJECT_SHARES), p=_OBJECT_SHARES)) + 1


def _rng(seed: int, *names: str) -> np.random.Generator:
    return np.random.default_rng([seed, *(int.from_bytes(name.encode(), "little") for name in names)])


def training_pictures(seed: int, count: int) -> Iterator[Picture]:
    """The pictures of the training pairs, without rendering them."""
    rng = _rng(seed, "pairs")
    for _ in range(count):
        yield sample_picture(rng, _num_objects(rng))


def build_vq_pictures(seed: int, count: int) -> list[PILImage.Image]:
    """Pictures of 3 to 7 objects for the VQ model: full of patches, and under the same held-out rule."""
    rng = _rng(seed, "vq")
    return [render(sample_picture(rng, int(rng.integers(3, 8)))) for _ in range(count)]


def _pair_rows(pairs: Iterable[tuple[str, Picture]]) -> Dataset:
    rows = [{"caption": text, "image": render(p), "picture": p.to_json()} for text, p in pairs]
    return Dataset.from_list(rows, features=PAIR_FEATURES)


def _pairs(rng: np.random.Generator, pictures: Iterable[Picture]) -> Dataset:
    return _pair_rows((caption(rng, p), p) for p in pictures)


def build_pairs(seed: int, sizes: PictureWorldSizes) -> DatasetDict:
    """Splits train, validation (the same kinds of pictures), unseen_single and unseen_pair (held out, see world.py)."""
    rng = _rng(seed, "pairs", "validation")
    validation = [sample_picture(rng, _num_objects(rng)) for _ in range(sizes.validation)]
    splits = {
        "train": _pairs(_rng(seed, "captions"), training_pictures(seed, sizes.pairs)),
        "validation": _pairs(rng, validation),
    }
    for name, num_objects, held_out in (("unseen_single", 1, "object"), ("unseen_pair", 2, "pair")):
        rng = _rng(seed, name)
        rows: dict[str, Picture] = {}  # no caption twice
        while len(rows) < sizes.unseen:
            picture = sample_picture(rng, num_objects, held_out)
            rows.setdefault(caption(rng, picture), picture)
        splits[name] = _pair_rows(rows.items())
    return DatasetDict(splits)


def build_texts(seed: int, sizes: PictureWorldSizes) -> DatasetDict:
    """Splits train and validation; no validation document is in train."""
    rng = _rng(seed, "texts", "validation")
    held_out = dict.fromkeys(document(rng) for _ in range(2 * sizes.validation))
    held_out = dict.fromkeys(list(held_out)[: sizes.validation])
    rng = _rng(seed, "texts")
    train: list[str] = []
    while len(train) < sizes.texts:
        text = document(rng)
        if text not in held_out:
            train.append(text)
    return DatasetDict(
        {"train": Dataset.from_dict({"text": train}), "validation": Dataset.from_dict({"text": list(held_out)})}
    )


def build_howtos(seed: int, sizes: PictureWorldSizes) -> DatasetDict:
    """Splits train and validation; columns messages (JSON, chat format), images, pictures (JSON, see world.py)."""
    splits = {}
    for name, count in (("train", sizes.howtos), ("validation", sizes.validation)):
        rng = _rng(seed, "howtos", name)
        rows = []
        for _ in range(count):
            messages, pictures = howto(rng, 2 if rng.random() < 0.4 else 3)
            rows.append(
                {
                    "messages": json.dumps(messages),
                    "images": [render(p) for p in pictures],
                    "pictures": [p.to_json() for p in pictures],
                }
            )
        splits[name] = Dataset.from_list(rows, features=HOWTO_FEATURES)
    return DatasetDict(splits)
