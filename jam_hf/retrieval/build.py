"""Building an index: captioned pictures in, a folder out, whole or not at all. It searches nothing."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Sequence
from typing import Any

from datasets import Dataset, Features, List, Value

from ..contents import load_saved_dataset
from ..files import check_free, whole_folder, write_whole
from ..model.configuration_jam import JamConfig
from ..model.modeling_jam import JamForCausalLM
from ..model.modeling_jam_vq import JamVQModel
from ..model.processing_jam import JamProcessor
from ..reading import read_config, read_whole
from .corpus import as_pairs, caption_ids, codes_and_pictures
from .embedder import ClipEmbedder, Embedder, embedded
from .index import (
    DESCRIPTION,
    DOCUMENTS,
    FAISS_FILE,
    RetrievalIndex,
    RetrievalSettings,
    check_faiss,
    described,
    load_index,
)


def build_index(
    documents: Dataset | Sequence[dict[str, Any]],
    model: JamForCausalLM | JamVQModel,
    processor: JamProcessor,
    output_dir: str | os.PathLike,
    embedder: Embedder | None = None,
    settings: RetrievalSettings | None = None,
    batch_size: int = 64,
    overwrite: bool = False,
) -> RetrievalIndex:
    """Encode and embed captioned pictures and write the index of them. An interrupted run leaves nothing.

    Args:
        documents: rows with `text` (or `caption`) and `image` (PIL or a path), or, encoded already by this VQ model,
            `codes` (int `[N]`, raw); `id` where rows have names of their own, otherwise their number is it.
        model: the JAM that will use the index, or its VQ model alone.
        embedder: CLIP ViT-B/32 [C] where `None`.
        settings: how many documents are retrieved, and what is a near-duplicate.
        batch_size: pictures at a time.
    Returns:
        the index, read from its folder.
    Raises:
        ValueError: if `batch_size` is no number of pictures, the embedder's vectors are not of length 1, columns are
            missing, ids are not unique, a caption is blank or has markup, a picture cannot be read, or codes are none
            of the VQ model's.
        FileExistsError: if `output_dir` holds anything and `overwrite` is False.
        ImportError: if FAISS is not installed.
    """
    check_faiss()
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a number of pictures, at least 1, got {batch_size!r}.")
    check_free(output_dir, overwrite)
    pairs = as_pairs(documents)
    vq_model = model.model.vq_model if isinstance(model, JamForCausalLM) else model
    embedder = ClipEmbedder() if embedder is None else embedder
    settings = RetrievalSettings() if settings is None else settings

    def encode(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, Any]:
        for caption in batch["text"]:
            caption_ids(processor, [caption])
        codes, pictures = codes_and_pictures(batch, vq_model, processor)
        return {
            "id": [str(name) for name in batch.get("id", numbers)],
            "text": batch["text"],
            "codes": codes,
            "embedding": embedded(embedder, batch["text"], [[picture] for picture in pictures]),
        }

    features = Features(
        id=Value("string"),
        text=Value("string"),
        codes=List(Value("int32"), length=vq_model.config.image_seq_length),
        embedding=List(Value("float32"), length=embedder.size),
    )
    with whole_folder(output_dir, overwrite) as folder:
        aside = folder / "encoded.arrow"
        encoded = pairs.map(
            encode,
            with_indices=True,
            batched=True,
            batch_size=batch_size,
            remove_columns=pairs.column_names,
            features=features,
            cache_file_name=str(aside),  # on the disk, so that an index may be larger than memory
            load_from_cache_file=False,
            new_fingerprint=uuid.uuid4().hex,
            desc="indexing",
        )
        encoded.save_to_disk(folder / DOCUMENTS)
        aside.unlink()
        _write_faiss(load_saved_dataset(folder / DOCUMENTS), str(folder / FAISS_FILE))
        write_whole(folder / DESCRIPTION, json.dumps(described(embedder, vq_model, settings), indent=2))
    return load_index(output_dir, processor, embedder, settings)


def load_vq_model(jam: str | os.PathLike) -> JamVQModel:
    """The VQ model of a saved JAM, without the rest of it: an index needs no more, and a JAM may be large.

    Raises:
        ValueError: if it is no JAM's checkpoint. OSError: if there is none.
    """
    config = read_config(jam)
    if not isinstance(config, JamConfig):
        raise ValueError(f"'{jam}' is a '{config.model_type}'; expected the folder or Hub id of a JAM.")
    keys = {r"^model\.vq_model\.": ""}
    return read_whole(_VQModelOfAJam, jam, "JAM", config=config.vq_config, key_mapping=keys)


class _VQModelOfAJam(JamVQModel):
    _keys_to_ignore_on_load_unexpected = [r"^model\.language_model\.", r"^lm_head\.", r"^image_head\."]


def _write_faiss(documents: Dataset, path: str) -> None:
    """Exact search by inner product."""
    import faiss

    documents.add_faiss_index("embedding", metric_type=faiss.METRIC_INNER_PRODUCT)
    documents.save_faiss_index("embedding", path)
