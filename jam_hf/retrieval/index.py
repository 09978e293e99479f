"""An index: captions, codes of their pictures and embeddings, searched for what is similar to a query.

A folder of it holds `documents/` (datasets' own files), `documents.faiss` and `index.json`. It knows a JAM's processor
and, when asked for the documents of prompts, the JAM; how they are laid out in a prompt is retrieval_prompts.py's
business.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset

from ..contents import load_saved_dataset, public_name
from ..files import read_json
from ..generation.retrieval_prompts import AugmentedPrompts, PromptDocument, RetrievalQuery, augment_prompts
from ..model.modeling_jam import JamForCausalLM
from ..model.modeling_jam_vq import JamVQModel
from ..model.processing_jam import JamProcessor
from .corpus import as_the_vq_model_sees, caption_ids, codebook_of
from .embedder import ClipEmbedder, Embedder, embedded


DOCUMENTS, FAISS_FILE, DESCRIPTION, FORMAT = "documents", "documents.faiss", "index.json", 1


@dataclass(frozen=True)
class RetrievalSettings:
    """How many documents are taken, and which are too similar to be of use.

    num_documents: at most so many; CM3leon is measured with 0, 1 and 2 [C]. max_score: documents that score more than
    this are near-duplicates and dropped [C: 0.9]; 1 drops none. We hold them against the query, as well as against each
    document that was taken already [R].
    """

    num_documents: int = 2
    max_score: float = 0.9

    def __post_init__(self) -> None:
        if isinstance(self.num_documents, bool) or not isinstance(self.num_documents, int) or self.num_documents < 0:
            raise ValueError(
                f"RetrievalSettings: num_documents must be a whole number, 0 or more, got {self.num_documents!r}."
            )
        if not isinstance(self.max_score, (int, float)) or not -1 <= self.max_score <= 1:
            raise ValueError(f"RetrievalSettings: max_score must be in -1..1, got {self.max_score!r}.")


class RetrievedDocument(NamedTuple):
    """id: the document's name. score: its similarity to the query, at most 1. text: its caption. codes: int64
    `[N]`, raw.
    """

    id: str
    score: float
    text: str
    codes: np.ndarray


def without_near_duplicates(scores: Sequence[float], vectors: np.ndarray, wanted: int, max_score: float) -> list[int]:
    """Which candidates are taken, from the most similar on: none that scores above `max_score` against the query, or
    against one that was taken before.

    Args:
        scores: against the query, falling. vectors: float32 `[candidates, D]`, of length 1.
    Returns:
        at most `wanted` numbers of candidates, in order.
    """
    taken: list[int] = []
    for candidate, score in enumerate(scores):
        if len(taken) == wanted:
            break
        others = (vectors[taken] @ vectors[candidate]).clip(-1, 1)
        if score <= max_score and not (others > max_score).any():
            taken.append(candidate)
    return taken


def check_faiss() -> None:
    """Raise an `ImportError` that says what to do if FAISS is not installed."""
    try:
        import faiss  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "An index is searched with FAISS, which is not installed: pip install 'jam_hf[retrieval]'."
        ) from error


def load_index(
    folder: str | os.PathLike,
    processor: JamProcessor,
    embedder: Embedder | None = None,
    settings: RetrievalSettings | None = None,
    device: Any = None,
) -> RetrievalIndex:
    """Read an index that `build_index` wrote; nothing is fetched where the embedder lies in a folder or in the cache.

    Args:
        processor: of the JAM that will use it.
        embedder: in place of the one that the index names, of which it must be a copy.
        settings: in place of those that the index was built with.
        device: where an embedder that is loaded here runs.
    Raises:
        ValueError: if the folder holds no index or a damaged one, or the embedder is not that of the index.
        ImportError: if FAISS is not installed.
    """
    check_faiss()
    folder = Path(folder)
    if not (folder / DESCRIPTION).is_file():
        raise ValueError(
            f"'{folder}' holds no index: there is no {DESCRIPTION}. Build one with build_index or `jam-hf index`."
        )
    try:
        description = read_json(folder / DESCRIPTION)
        if description["format"] != FORMAT:
            raise ValueError(f"its format is {description['format']!r}, this jam_hf reads {FORMAT}")
        named = description["embedder"]
        settings = settings or RetrievalSettings(**description["settings"])
        documents = load_saved_dataset(folder / DOCUMENTS)
        documents.load_faiss_index("embedding", str(folder / FAISS_FILE))
    except Exception as error:  # json, datasets and faiss have no common base class
        raise ValueError(
            f"The index '{folder}' is damaged or of another version ({type(error).__name__}: {error})."
        ) from error
    if embedder is None:
        if not named.get("on_hub", not Path(named["name"]).is_absolute()):
            raise ValueError(
                f"The index '{folder}' was built with an embedder that is not on the Hub, "
                f"'{public_name(named['name'])}'. Say where it lies: embedder=ClipEmbedder('path/to/it') "
                "(--retriever-embedder)."
            )
        embedder = ClipEmbedder(named["name"], named["revision"], device)
    if embedder.fingerprint != named["fingerprint"] or embedder.size != named["size"]:
        raise ValueError(
            f"The embedder '{embedder.name}' is not the one that the index '{folder}' was built with, "
            f"'{named['name']}' (revision {named['revision']}): scores would mean nothing. Pass that one, or build the "
            "index again."
        )
    return RetrievalIndex(documents, description, processor, embedder, settings)


class RetrievalIndex:
    """Documents to be retrieved: `generate(retriever=index)`. `load_index` and `build_index` make one.

    `settings` may be replaced at any time. `len(index)` is the number of documents; `index.documents` is their dataset,
    with the columns `id`, `text`, `codes` and `embedding`.
    """

    def __init__(
        self,
        documents: Dataset,
        description: dict[str, Any],
        processor: JamProcessor,
        embedder: Embedder,
        settings: RetrievalSettings,
    ):
        self.documents, self.description = documents, description
        self.processor, self.embedder, self.settings = processor, embedder, settings

    def __len__(self) -> int:
        return len(self.documents)

    def __repr__(self) -> str:
        return f"RetrievalIndex({len(self)} documents, embedder={self.embedder.name!r}, {self.settings})"

    def retrieve(self, texts: Any = None, images: Any = None) -> list[list[RetrievedDocument]]:
        """Find documents for queries of text, pictures or both.

        Args:
            texts: one text, or a list with one (or `None`) for each query.
            images: what the processor takes as a picture, or a list with one, a list of them or `None` for each query.
        Returns:
            for each query its documents, the most similar first, without near-duplicates.
        Raises:
            ValueError: if a query is empty, or there are not as many texts as pictures.
        """
        if texts is None and images is None:
            raise ValueError("retrieve: expected texts, images or both.")
        texts = [texts] if isinstance(texts, str) else texts
        images = images if images is None or isinstance(images, (list, tuple)) else [images]
        count = len(texts if texts is not None else images)
        if not count:
            return []
        texts = [None] * count if texts is None else texts
        images = [None] * count if images is None else images
        pictures = [[] if i is None else list(i) if isinstance(i, (list, tuple)) else [i] for i in images]
        if len(texts) != len(pictures):
            raise ValueError(f"retrieve: {len(texts)} texts and {len(pictures)} entries of pictures; expected as many.")
        seen = [as_the_vq_model_sees(self.processor, each)[1] for each in pictures]
        return [self._named(found) for found in self.search(embedded(self.embedder, texts, seen))]

    def search(
        self,
        queries: np.ndarray,
        num_documents: Sequence[int] | None = None,
        left_out: Sequence[Sequence[int]] | None = None,
    ) -> list[list[tuple[float, int]]]:
        """Maximum inner product search [C], without near-duplicates.

        Args:
            queries: float32 `[B, D]`, of length 1.
            num_documents: for each query, in place of that of the settings.
            left_out: for each query the rows that are not to be taken.
        Returns:
            for each query the scores and rows of its documents, the most similar first.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        wanted = [self.settings.num_documents] * len(queries) if num_documents is None else num_documents
        left_out = [()] * len(queries) if left_out is None else left_out
        answers: dict[int, list[tuple[float, int]]] = {i: [] for i, count in enumerate(wanted) if count == 0}
        total, candidates = len(self), 4 * max(wanted, default=0) + max(map(len, left_out), default=0)
        while rest := [i for i in range(len(queries)) if i not in answers]:  # most often one round is enough
            candidates = min(total, candidates)
            scores_RC, rows_RC = self.documents.search_batch("embedding", queries[rest], k=candidates)
            for i, scores, rows in zip(rest, scores_RC, rows_RC):
                best = sorted(zip((-scores.clip(-1, 1)).tolist(), rows.tolist()))  # rounding makes a 1 a little more
                ranked = [(-negative, row) for negative, row in best if row not in left_out[i]]
                vectors = self._embeddings([row for _, row in ranked])
                kept = without_near_duplicates(
                    [score for score, _ in ranked], vectors, wanted[i], self.settings.max_score
                )
                if len(kept) == wanted[i] or candidates == total:
                    answers[i] = [ranked[k] for k in kept]
            candidates *= 2
        return [answers[i] for i in range(len(queries))]

    def _embeddings(self, rows: Sequence[int]) -> np.ndarray:
        """float32 `[len(rows), D]`, as FAISS keeps them: another view of the dataset would be a copy of its index
        too.
        """
        vectors = self.documents.get_index("embedding").faiss_index
        return vectors.reconstruct_batch(np.array(rows, dtype=np.int64))

    def _named(self, found: list[tuple[float, int]]) -> list[RetrievedDocument]:
        rows = [self.documents[row] for _, row in found]
        return [
            RetrievedDocument(row["id"], score, row["text"], np.array(row["codes"]))
            for (score, _), row in zip(found, rows)
        ]

    def check_codes(self, vq_model: JamVQModel) -> None:
        """Raise a `ValueError` if the index's codes were not made by this VQ model."""
        own = {name: self.description[name] for name in ("codebook", "num_codes", "codes_per_picture")}
        given = codebook_of(vq_model)
        if own != given:
            raise ValueError(
                f"The codes of this index are those of another VQ model: {own['codes_per_picture']} of "
                f"{own['num_codes']}, codebook {own['codebook'][:12]}; the JAM has {given['codes_per_picture']} of "
                f"{given['num_codes']}, codebook {given['codebook'][:12]}. Build the index with this JAM's VQ model."
            )

    def documents_for(self, model: JamForCausalLM, queries: Sequence[RetrievalQuery]) -> list[list[PromptDocument]]:
        """See [`Retriever`]. A prompt's text is what its ids say without special tokens; its pictures are those that
        came as pixels, and what the VQ model decodes of those that came as codes.
        """
        self.check_codes(model.model.vq_model)
        texts: list[str | None] = []
        pictures: list[list[Any]] = []
        for ids, pixel_values in queries:
            holes = groupby(ids.tolist(), key=lambda token: token == model.config.image_token_id)
            pieces = [torch.tensor([list(run)]) for is_hole, run in holes if not is_hole]
            segments = [s for piece in pieces for s in self.processor.post_process_interleaved(piece, model)[0]]
            texts.append(" ".join(s["text"].strip() for s in segments if s["type"] == "text") or None)
            decoded = [s["image"] for s in segments if s["type"] == "image" and s["image"] is not None]
            given = self.processor.image_processor.postprocess(pixel_values) if len(pixel_values) else []
            pictures.append([*given, *decoded])
        for row, (text, images) in enumerate(zip(texts, pictures)):
            if text is None and not images:
                raise ValueError(
                    f"Prompt {row} has neither text nor a whole picture for which the index could be searched."
                )
        answers = []
        for found in self.search(embedded(self.embedder, texts, pictures)):
            documents = self._named(found)
            captions = caption_ids(self.processor, [document.text for document in documents])
            answers.append(
                [PromptDocument(d.id, d.score, ids, d.codes.tolist()) for d, ids in zip(documents, captions)]
            )
        return answers

    def augment(self, model: JamForCausalLM, inputs: Any, max_new_tokens: int | None = None) -> AugmentedPrompts:
        """What `generate(retriever=index)` makes of a processor's output, for use without it; see `augment_prompts`."""
        names = ("input_ids", "attention_mask", "pixel_values")
        return augment_prompts(
            model, self, **{n: inputs[n] for n in names if n in inputs}, max_new_tokens=max_new_tokens
        )


MemoryIndex = RetrievalIndex  # its older name


def described(embedder: Embedder, vq_model: JamVQModel, settings: RetrievalSettings) -> dict[str, Any]:
    """What `index.json` says."""
    named = {name: getattr(embedder, name) for name in ("name", "revision", "fingerprint", "size")}
    # Where it lies is nobody else's business, and an index that comes from elsewhere must not say what is opened here.
    named |= {"name": public_name(named["name"]), "on_hub": public_name(named["name"]) == named["name"]}
    return {"format": FORMAT, "embedder": named, "settings": asdict(settings), **codebook_of(vq_model)}
