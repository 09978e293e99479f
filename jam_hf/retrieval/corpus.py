"""The documents of an index: captions as ids, pictures as codes and as what is embedded. It knows no index and no
embedder.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image

from ..model.modeling_jam_vq import JamVQModel
from ..model.processing_jam import JamProcessor
from .embedder import fingerprint


def as_pairs(documents: Dataset | Sequence[dict[str, Any]]) -> Dataset:
    """Captioned pictures as a dataset with `text` and `image` or `codes`, and `id` where they have it.

    Args:
        documents: rows with `text` (or `caption`) and `image` (PIL or a path) or `codes` (int `[N]`, raw).
    Raises:
        ValueError: if a column is missing, there are no rows, or ids are not unique.
    """
    if isinstance(documents, Dataset):
        dataset = documents
    else:
        documents = list(documents)
        if strange := next((row for row in documents if not isinstance(row, dict)), None):
            raise ValueError(
                "Expected a Dataset, or a list with one dict for each document (text and image or codes); got "
                f"{strange!r:.80} among the rows. Of a dict of columns Dataset.from_dict(...) makes one."
            )
        dataset = Dataset.from_list(documents)
    dataset = dataset.with_format(None)
    if "text" not in dataset.column_names and "caption" in dataset.column_names:
        dataset = dataset.rename_column("caption", "text")
    columns = dataset.column_names
    if not len(dataset) or "text" not in columns or not {"image", "codes"} & set(columns):
        found = ", ".join(columns) or "none"
        raise ValueError(
            f"Expected documents with the columns text and image, or text and codes; got {len(dataset)} rows with the "
            f"columns {found}."
        )
    if "id" in columns and len(set(dataset["id"])) < len(dataset):
        raise ValueError("The documents' ids are not unique: by its id a user tells which document was used.")
    picture = "codes" if "codes" in columns else "image"
    return dataset.select_columns([*(["id"] if "id" in columns else []), "text", picture])


def codes_and_pictures(
    batch: dict[str, list[Any]], vq_model: JamVQModel, processor: JamProcessor
) -> tuple[np.ndarray, list[Image.Image]]:
    """Rows of `as_pairs` to codes, int64 `[P, N]`, and the P pictures to embed.

    Raises:
        ValueError: if a picture cannot be read, or codes are not N of this VQ model's.
    """
    if "image" in batch:
        pixel_values, pictures = as_the_vq_model_sees(processor, batch["image"])
        return vq_model.encode(pixel_values).cpu().numpy(), pictures
    config = vq_model.config
    for codes in batch["codes"]:
        if len(codes) != config.image_seq_length or min(codes) < 0 or max(codes) >= config.num_vq_embeddings:
            raise ValueError(
                f"A document has {len(codes)} codes in {min(codes, default=0)}..{max(codes, default=0)}; expected "
                f"{config.image_seq_length} in 0..{config.num_vq_embeddings - 1}, as this VQ model makes them."
            )
    codes_PN = torch.tensor(batch["codes"])
    return codes_PN.numpy(), processor.image_processor.postprocess(vq_model.decode(codes_PN).clamp(*config.pixel_range))


def codebook_of(vq_model: JamVQModel) -> dict[str, Any]:
    """What codes depend on: the codebook's digest, its size (K) and the codes of a picture (N)."""
    config = vq_model.config
    entries = torch.arange(
        config.num_vq_embeddings, device=vq_model.device if vq_model.device.type != "meta" else "cpu"
    )
    with torch.no_grad():  # through its module, so that an offloaded one is found too
        digest = fingerprint(vq_model.vq.quantize.embedding(entries))
    return {"codebook": digest, "num_codes": config.num_vq_embeddings, "codes_per_picture": config.image_seq_length}


def as_the_vq_model_sees(processor: JamProcessor, pictures: Sequence[Any]) -> tuple[torch.Tensor | None, list[Any]]:
    """float `[P, 3, H, W]` and P PIL pictures of it: the square that becomes codes is also what is embedded (ours [R]).

    So a picture scores alike whether it came as a file or in a prompt, as pixels.
    """
    if not pictures:
        return None, []
    opened = processor.image_processor.fetch_images(list(pictures))
    pixel_values = processor.image_processor(opened, return_tensors="pt")["pixel_values"]
    return pixel_values, processor.image_processor.postprocess(pixel_values)


def caption_ids(processor: JamProcessor, captions: Sequence[str]) -> list[list[int]]:
    """Ids of captions that stand in one document, each before its picture: as the tokenizer has them there.

    Raises:
        ValueError: if a caption is no text, is blank or has a special token, which would be markup and not a caption's
            words.
    """
    for caption in captions:
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"A document of an index needs a caption, a text that is not blank; got {caption!r}.")
    if not captions:
        return []
    tokenizer = processor.tokenizer
    text = "".join(caption + processor.image_token for caption in captions)
    special = _special_ids(tokenizer, len(tokenizer))
    rows: list[list[int]] = [[]]
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        if token == processor.image_token_id:
            rows.append([])
        elif token in special:
            caption = captions[min(len(rows), len(captions)) - 1]
            raise ValueError(
                f"The caption {caption!r} has the special token {tokenizer.convert_ids_to_tokens(token)!r}, which is "
                "markup. Take it out of the caption."
            )
        else:
            rows[-1].append(token)
    if len(rows) != len(captions) + 1 or rows.pop():
        raise ValueError(
            f"A caption of {list(captions)!r:.200} has {processor.image_token} itself. Take it out of the caption."
        )
    return rows


@lru_cache(maxsize=4)
def _special_ids(tokenizer: Any, size: int) -> frozenset[int]:
    """Kept, as a JAM's tokenizer has thousands of them: the image codes."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added.union(tokenizer.all_special_ids))
