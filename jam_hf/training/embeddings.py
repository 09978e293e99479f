"""A head start for image codes: embedding rows that know which codes look alike.

A language model that meets its image codes as strangers must learn from counts alone that two of them show the same colour.
The codebook knows: its vectors are what the codes look like. It knows no data and trains nothing.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..model.modeling_jam_vq import JamVQModel


@torch.no_grad()
def initialise_image_embeddings(
    model: PreTrainedModel, vq: JamVQModel, image_token_offset: int, std: float, seed: int = 0
) -> int:
    """Set the input and output embedding rows of image codes to a random rotation of their codebook vectors (ours [R]).

    Args:
        model: causal LM whose vocabulary holds the image codes.
        std: standard deviation of the rows' entries, as of the other rows.
    Returns:
        the number of rows set; codes whose vectors lie far off (never used by the VQ model) keep their random rows.
    Raises:
        ValueError: if the vocabulary ends before the last image code.
    """
    codebook = vq.vq.quantize.embedding.weight.detach().float().cpu()
    last = image_token_offset + len(codebook)
    tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    if last > len(tables[0]):
        raise ValueError(
            f"The image codes would take the ids {image_token_offset}..{last - 1}, but the model's vocabulary has "
            f"{len(tables[0])}."
        )
    norms = codebook.norm(dim=1)
    used = norms <= 3 * norms.median()
    centred = codebook - codebook[used].mean(0)
    centred = centred / centred[used].std()
    generator = torch.Generator().manual_seed(seed)
    for index, table in enumerate(tables):
        if index and table is tables[0]:
            continue  # tied
        directions = torch.linalg.qr(torch.randn(table.shape[1], codebook.shape[1], generator=generator))[0]
        rows = centred @ directions.T
        rows = rows * (std / rows[used].std())
        target = table[image_token_offset:last]
        target[used.to(table.device)] = rows[used].to(table)
    return int(used.sum())
