"""Training documents with retrieval: retrieved documents first, the pair last [C]. What trains on them is not known
here.

The rows go through `encode_documents`, and so through CM3 and the collator, as all documents do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from tqdm import tqdm

from ..data.seeds import check_seed
from ..generation.retrieval_prompts import how_many_fit
from ..model.modeling_jam import JamForCausalLM
from .corpus import as_pairs, caption_ids, codes_and_pictures
from .embedder import embedded
from .index import RetrievalIndex


def stack_codes(codes: Sequence[Sequence[int]]) -> np.ndarray:
    """`encode_images` of [`encode_documents`] for pictures that are codes already: int64 `[P, N]`."""
    return np.asarray(codes, dtype=np.int64)


def documents_with_retrieval(
    index: RetrievalIndex,
    model: JamForCausalLM,
    pairs: Dataset | Sequence[dict[str, Any]] | None = None,
    max_documents: int | None = None,
    max_length: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> Dataset:
    """Captioned pictures behind documents that were retrieved for them.

    For each pair a number of documents is drawn, evenly from 0 to `max_documents` (ours [R]; CM3leon is measured with
    0, 1 and 2 [C]), by the seed and the pair's number. The query is the pair, text and picture; it is itself never
    retrieved.

        rows = documents_with_retrieval(index, model, pairs, max_length=4096)
        encode_documents(rows, processor.tokenizer, stack_codes, config=model.config, max_length=4096)

    Args:
        pairs: rows with `text` (or `caption`) and `image` or `codes`; the index's own documents where `None`.
        max_documents: the number of the index's settings where `None`.
        max_length: in tokens; retrieved documents that do not fit are left out, the least similar first.
    Returns:
        a dataset with `text` (captions, `<image>` behind each), `images` (raw codes) and `retrieved_ids`, row by row as
        `pairs`.
    Raises:
        ValueError: if the index's codes are not those of the model, columns are missing, or a caption is blank or has
            markup.
    """
    check_seed(seed, "documents_with_retrieval")
    most = index.settings.num_documents if max_documents is None else max_documents
    if isinstance(most, bool) or not isinstance(most, int) or most < 0:
        raise ValueError(
            f"documents_with_retrieval: max_documents must be a whole number, 0 or more, got {max_documents!r}."
        )
    index.check_codes(model.model.vq_model)
    dataset = index.documents if pairs is None else as_pairs(pairs)
    by_caption: dict[str, list[int]] = defaultdict(list)
    for row, text in enumerate(index.documents["text"]):
        by_caption[text].append(row)

    rows: list[dict[str, Any]] = []
    for start in tqdm(range(0, len(dataset), batch_size), desc="retrieving", unit="batch"):
        batch = dataset[start : start + batch_size]
        texts = batch["text"]
        if pairs is None:
            codes, queries = np.asarray(batch["codes"]), np.asarray(batch["embedding"])
        else:
            codes, pictures = codes_and_pictures(batch, model.model.vq_model, index.processor)
            queries = embedded(index.embedder, texts, [[picture] for picture in pictures])
        wanted = [int(np.random.default_rng([seed, start + i]).integers(most + 1)) for i in range(len(texts))]
        itself = [
            [row for row in by_caption.get(text, ()) if np.array_equal(index.documents[row]["codes"], own)]
            for text, own in zip(texts, codes)
        ]
        for text, own, found in zip(texts, codes, index.search(queries, wanted, itself)):
            rows.append(_document(index, model, [index.documents[row] for _, row in found], text, own, max_length))
    features = Features(text=Value("string"), images=List(List(Value("int32"))), retrieved_ids=List(Value("string")))
    return Dataset.from_list(rows, features=features)


def _document(
    index: RetrievalIndex,
    model: JamForCausalLM,
    retrieved: list[dict[str, Any]],
    text: str,
    codes: np.ndarray,
    max_length: int | None,
) -> dict[str, Any]:
    """One row: as many of the retrieved documents as `max_length` holds, and the pair."""
    processor = index.processor
    captions = caption_ids(processor, [*(document["text"] for document in retrieved), text])
    if max_length is not None:
        around = processor.tokenizer("")["input_ids"]
        end = model.config.document_end(processor.tokenizer.eos_token_id)
        around += [] if around[-1:] == [end] else [end]
        *lengths, own = (len(ids) + model.config.picture_length + 2 for ids in captions)
        retrieved = retrieved[: how_many_fit(lengths, max_length - own - len(around))]
    return {
        "text": "".join(caption + processor.image_token for caption in (*(d["text"] for d in retrieved), text)),
        "images": [np.asarray(own, dtype=np.int32) for own in (*(d["codes"] for d in retrieved), codes)],
        "retrieved_ids": [document["id"] for document in retrieved],
    }


def documents_with_memory(index: RetrievalIndex, model: JamForCausalLM, *args: Any, **settings: Any) -> Dataset:
    """`documents_with_retrieval` by its older name, with `memory_ids` in place of `retrieved_ids`."""
    found = documents_with_retrieval(index, model, *args, **settings)
    return found.rename_column("retrieved_ids", "memory_ids")
