"""A head start for image codes: embedding rows that know which codes look alike, and which words they come with.

A language model that meets its image codes as strangers must learn from counts alone that two of them show the same
colour, or the same shape. The codebook knows what codes look like; captions know what they are called. It trains
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from ..model.modeling_jam_vq import JamVQModel


def word_features(
    documents: Sequence[Sequence[int]], code_ids: torch.LongTensor, vocab_size: int, size: int = 24
) -> torch.Tensor:
    """Latent semantic features of image codes, float `[K, size]`: what they are called. code_ids: int64 `[K]`.

    The left singular vectors (times the root of their singular values) of the pointwise mutual information of "code
    occurs in the document" and "text token occurs in the document". Codes that never occur, and tokens in fewer than
    0.5 % of the documents, count as zero.
    """
    code_of = np.full(vocab_size, -1)
    code_of[code_ids.numpy()] = np.arange(len(code_ids))
    counts = np.zeros((len(code_ids), vocab_size))
    for document in documents:
        ids = np.unique(np.asarray(document))
        codes = code_of[ids]
        counts[np.ix_(codes[codes >= 0], ids[codes < 0])] += 1
    joint = torch.from_numpy(counts)
    codes, words = joint.sum(1, keepdim=True), joint.sum(0, keepdim=True)
    information = torch.log((joint * joint.sum() + 1e-9) / (codes * words + 1e-9)).clamp(-3, 3)
    rare = joint.amax(0) < 0.005 * len(documents)
    information[:, rare] = 0.0
    occurs = codes[:, 0] > 0
    information[~occurs] = 0.0
    information[occurs] -= information[occurs].mean(0)
    left, values, _ = torch.linalg.svd(information, full_matrices=False)
    return (left * values.sqrt())[:, :size].float()


@torch.no_grad()
def initialise_image_embeddings(
    model: PreTrainedModel,
    vq: JamVQModel,
    code_ids: int | torch.LongTensor,
    std: float,
    documents: Sequence[Sequence[int]] | None = None,
    seed: int = 0,
) -> int:
    """Set the input and output embedding rows of image codes to a random rotation of what is known of them (ours [R]).

    Known are the codebook vectors and, where encoded `documents` are given, the `word_features` (with twice the
    weight).

    Args:
        model: causal LM whose vocabulary holds the image codes.
        code_ids: id of code 0, where the others follow it, or the ids of all codes, int64 `[K]`.
        std: standard deviation of the rows' entries.
    Returns:
        the number of rows set; codes whose vectors lie far off (never used by the VQ model) keep their random rows.
    Raises:
        ValueError: if there are not as many ids as codes, or the vocabulary ends before the last.
    """
    codebook = vq.vq.quantize.embedding.weight.detach().float().cpu()
    if isinstance(code_ids, int):
        code_ids = torch.arange(code_ids, code_ids + len(codebook))
    if len(code_ids) != len(codebook):
        raise ValueError(
            f"There are {len(code_ids)} ids for the {len(codebook)} codes of the VQ model; expected as many."
        )
    tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    if int(code_ids.max()) >= len(tables[0]):
        raise ValueError(
            f"The image codes would take the ids {int(code_ids.min())}..{int(code_ids.max())}, but the model's "
            f"vocabulary has {len(tables[0])}."
        )
    norms = codebook.norm(dim=1)
    used = norms <= 3 * norms.median()
    features = _standardised(_half_whitened(codebook, used), used)
    if documents is not None:
        words = word_features(documents, code_ids, len(tables[0]))
        features = torch.cat((0.5 * features, _standardised(words, used)), dim=1)
    generator = torch.Generator().manual_seed(seed)
    for index, table in enumerate(tables):
        if index and table is tables[0]:
            continue  # tied
        directions = torch.randn(table.shape[1], features.shape[1], generator=generator)
        if features.shape[1] <= table.shape[1]:
            directions = torch.linalg.qr(directions)[0]
        rows = features @ directions.T
        rows = rows * (std / rows[used].std())
        table[code_ids[used].to(table.device)] = rows[used].to(table)
    return int(used.sum())


def _half_whitened(features: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """Principal components, each divided by the root of its standard deviation: faint differences count for more."""
    centred = features - features[used].mean(0)
    _, values, directions = torch.linalg.svd(centred[used], full_matrices=False)
    return centred @ directions.T / (values / len(values) ** 0.5).clamp(min=1e-6).sqrt()


def _standardised(features: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    centred = features - features[used].mean(0)
    return centred / centred[used].std().clamp(min=1e-6)
