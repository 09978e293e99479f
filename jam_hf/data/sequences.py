"""Documents to token ids, once: text with `<image>` placeholders and pictures, or chats with pictures, to `input_ids`.

It knows the tokenizer and a function from pictures to codes; it trains nothing. Codes are computed once, here.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from PIL import Image
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..model.configuration_jam import JamConfig
from ..model.picture_input_jam import open_picture
from ..model.picture_layout_jam import PictureLayout
from .chats import chat_pictures, check_that_parts_are_written, plain_chat
from .code_names import num_named_codes
from .seeds import check_seed


logger = logging.getLogger(__name__)

EncodeImages = Callable[[Sequence[Image.Image]], np.ndarray]


def encode_documents(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    encode_images: EncodeImages | None = None,
    image_token_offset: int | None = None,
    max_length: int | None = None,
    too_long: str = "error",
    batch_size: int = 256,
    description: str = "encoding",
    config: JamConfig | None = None,
    layout: PictureLayout | None = None,
) -> Dataset:
    """Encode documents for training.

    Args:
        dataset: rows with `text` (with `<image>` placeholders) and `images`; or `caption` and `image` (a pair: the
            caption, then its picture [C]); or `messages` (chat format, or its JSON), whose parts name their pictures or
            leave them to `images`, in order. No pictures: `text` alone.
        encode_images: pictures to raw codes, int64 `[P, N]`; needed where there are pictures.
        image_token_offset: id of image code 0; the tokenizer's `<img:0>` where `None`.
        config: of the JAM that the documents are for: its ids, ends, and what stands in its pictures. Where `None`, a
            picture is `<break> codes <break>`, by the tokenizer's ids.
        layout: instead of these two, how another model writes pictures (an image parent, say).
        max_length, too_long: documents with more tokens raise ("error") or are left out with a warning ("drop"); none
            is cut.
    Returns:
        a dataset with `input_ids`: `<s> text <break> codes <break> text ... </s>` [A].
    Raises:
        ValueError: if placeholders and pictures do not match (the row is named), a document is too long, a text has
            `<break>`, image codes or another token of pictures of its own, the codes are not what `encode_images` must
            return or not as many as the config says, or the tokenizer lacks a token.
    """
    if too_long not in ("error", "drop"):
        raise ValueError(f"too_long must be 'error' or 'drop', got {too_long!r}.")
    if layout is None:
        layout = _picture_layout(tokenizer, image_token_offset, config)
    elif image_token_offset is not None or config is not None:
        raise ValueError("encode_documents: layout says what image_token_offset and config say; pass one of the three.")
    ends = [] if config is None else config.eos_token_ids
    end = tokenizer.eos_token_id if config is None else config.document_end(tokenizer.eos_token_id)
    if end is None:
        raise ValueError(
            "encode_documents: the tokenizer has no eos_token to end a document in. Pass the JAM's config."
        )
    placeholder = "" if layout.placeholder is None else tokenizer.convert_ids_to_tokens(layout.placeholder)
    reserved = (layout.begin, layout.end, *layout.structure)
    documents: list[np.ndarray] = []
    dropped = 0
    for start in tqdm(range(0, len(dataset), batch_size), desc=description, unit="batch"):
        rows = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        texts, pictures = zip(
            *(_text_and_images(row, tokenizer, placeholder, start + index) for index, row in enumerate(rows))
        )
        flat = [picture for row in pictures for picture in row]
        codes: Iterator[np.ndarray] = iter(())
        if flat:
            if encode_images is None:
                raise ValueError("The documents have pictures; pass encode_images to turn them into codes.")
            codes = iter(_laid_out(encode_images(flat), len(flat), layout))
        encoded = tokenizer(list(texts), add_special_tokens=True)["input_ids"]
        for index, (ids, row) in enumerate(zip(encoded, pictures)):
            ids = np.asarray(ids, dtype=np.int64)
            if (np.isin(ids, reserved) | layout.are_codes(ids)).any():
                raise ValueError(
                    f"The text of document {start + index} has <break> or image codes itself, or other tokens of "
                    "pictures; they are put in here, for each <image>. Take them out of the text."
                )
            places = np.flatnonzero(ids == layout.placeholder) if placeholder else np.array([], dtype=np.int64)
            if len(places) != len(row):
                raise ValueError(
                    f"Document {start + index} has {len(places)} placeholder(s) <image> and {len(row)} picture(s); "
                    "each placeholder needs its picture, in order."
                )
            parts, position = [], 0
            for place in places.tolist():
                parts += [ids[position:place], [layout.begin], next(codes), [layout.end]]
                position = place + 1
            parts.append(ids[position:])
            document = np.concatenate(parts).astype(np.int32)
            if document[-1] not in (end, *ends):
                document = np.append(document, np.int32(end))
            if max_length is not None and len(document) > max_length:
                if too_long == "error":
                    raise ValueError(
                        f"Document {start + index} has {len(document)} tokens, max_length is {max_length}. Split it, "
                        "raise max_length, or pass too_long='drop'."
                    )
                dropped += 1
                continue
            documents.append(document)
    if dropped:
        logger.warning(
            "%d of %d documents are longer than %d tokens and were left out.", dropped, len(dataset), max_length
        )
    features = Features({"input_ids": List(Value("int32"))})
    return Dataset.from_dict({"input_ids": documents}, features=features)


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    index = tokenizer.get_vocab().get(token)
    if index is None:
        raise ValueError(f"The tokenizer has no token {token}; encode_documents needs a JAM's (see train_tokenizer).")
    return index


def _checked_codes(codes: np.ndarray, num_images: int, num_codes: int) -> np.ndarray:
    codes = np.asarray(codes)
    if codes.ndim != 2 or len(codes) != num_images or not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(
            f"encode_images must return integers [{num_images}, N] for {num_images} picture(s), got {codes.dtype} "
            f"{list(codes.shape)}."
        )
    if codes.min() < 0 or codes.max() >= num_codes:
        allowed = f"0..{num_codes - 1}" if num_codes < 2**32 else "0 or more"  # not known
        raise ValueError(f"encode_images must return raw codes, {allowed}, got {codes.min()}..{codes.max()}.")
    return codes


# For documents of text alone, in a tokenizer that has no tokens of pictures.
NO_PICTURES = PictureLayout(-1, -1)


def _picture_layout(tokenizer: PreTrainedTokenizerBase, offset: int | None, config: JamConfig | None) -> PictureLayout:
    if config is None:
        first = _token_id(tokenizer, "<img:0>") if offset is None else offset
        mark, image = (_token_id(tokenizer, token) for token in ("<break>", "<image>"))
        count = num_named_codes(tokenizer) if offset is None else None
        return PictureLayout(
            mark, mark, range(first, sys.maxsize if count is None else first + count), placeholder=image
        )
    if offset not in (None, config.image_token_offset):
        raise ValueError(
            f"encode_documents: image_token_offset is {offset}, but {config.image_token_offset} in the config. Leave "
            "it out where you pass the config."
        )
    return config.picture_layout


def _laid_out(codes: np.ndarray, num_images: int, layout: PictureLayout) -> np.ndarray:
    """Raw codes `[P, N]` to ids, in their places among the others of the layout: `[P, L]`."""
    num_codes = len(layout.codes)
    codes = _checked_codes(codes, num_images, num_codes)
    if layout.grid is not None and codes.shape[1] != len(layout.positions):
        raise ValueError(
            f"encode_images must return the {len(layout.positions)} codes of a picture that the config says, got "
            f"{codes.shape[1]}."
        )
    return layout.inside(layout.ids_of(codes))


def _text_and_images(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, placeholder: str, index: int
) -> tuple[str, list[Image.Image]]:
    if "messages" in row:
        chat = plain_chat(json.loads(row["messages"]) if isinstance(row["messages"], str) else row["messages"])
        render = partial(tokenizer.apply_chat_template, tokenize=False)
        beside = list(row["images"]) if row.get("images") else None
        try:
            check_that_parts_are_written(chat, render, placeholder)
            pictures = chat_pictures(chat, placeholder, beside)
        except ValueError as error:
            raise ValueError(f"Document {index}: {error}") from None
        opened = [
            picture if isinstance(picture, (np.ndarray, torch.Tensor)) else open_picture(picture)
            for picture in pictures
        ]
        text = render(chat).removeprefix(tokenizer.bos_token or "")
        return text, opened + (beside or [])  # the tokenizer puts the <s> first, as for all documents
    if "caption" in row:
        return row["caption"] + placeholder, [row["image"]]
    if "text" not in row:
        raise ValueError(f"A document needs a column text, caption or messages; got {', '.join(row)}.")
    return row["text"], list(row.get("images") or [])


def document_end(config: JamConfig, tokenizer_eos_token_id: int | None) -> int:
    """`JamConfig.document_end`: the id in which documents for training end: the tokenizer's eos where `generate()`
    stops there, else the first of `eos_token_ids`.

    Raises:
        ValueError: if neither says one.
    """
    ids = config.eos_token_ids
    if ids and tokenizer_eos_token_id not in ids:
        return ids[0]
    if tokenizer_eos_token_id is None:
        raise ValueError(
            "Neither the tokenizer (eos_token) nor the config (eos_token_id) says what ends a document. Set "
            "eos_token_id in config.json and generation_config.json."
        )
    return tokenizer_eos_token_id


def mix_datasets(datasets: dict[str, Dataset], weights: dict[str, float], num_documents: int, seed: int = 0) -> Dataset:
    """`num_documents` documents, shuffled, in shares by `weights`; a dataset that is too small is gone through again.

    Raises:
        ValueError: if names differ, a weight is negative or a dataset is empty.
    """
    if set(datasets) != set(weights):
        raise ValueError(
            f"mix_datasets: datasets {sorted(datasets)} and weights {sorted(weights)} must have the same names."
        )
    if any(w < 0 for w in weights.values()) or sum(weights.values()) <= 0:
        raise ValueError(f"mix_datasets: weights must not be negative, and not all zero, got {weights}.")
    check_seed(seed, "mix_datasets")
    from datasets import concatenate_datasets

    rng = np.random.default_rng(seed)
    exact = {name: num_documents * weights[name] / sum(weights.values()) for name in datasets}
    counts = {name: int(share) for name, share in exact.items()}
    rest = num_documents - sum(counts.values())  # what rounding down left over goes to the largest remainders
    for name in sorted(exact, key=lambda name: counts[name] - exact[name])[:rest]:
        counts[name] += 1
    parts = []
    for name, dataset in datasets.items():
        count = counts[name]
        if count and not len(dataset):
            raise ValueError(f"mix_datasets: dataset '{name}' is empty.")
        rounds = -(-count // max(len(dataset), 1))
        order = np.concatenate([rng.permutation(len(dataset)) for _ in range(rounds)])[:count] if count else []
        parts.append(dataset.select(order))
    return concatenate_datasets(parts).shuffle(seed=seed)
