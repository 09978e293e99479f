"""The maths of fusion: short pure functions on tensors. They know nothing of keys, files or models.

Each takes the same rows of the parents' tensors and makes rows of the JAM's, so that a tensor can be made block by
block.
Shapes: rows of a linear weight are `[n, in]`, of an embedding `[n, d]`, of a norm or a bias `[n]`.
"""

from __future__ import annotations

import hashlib

import torch


def average(text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Mean of the two parents, taken in float32 (JAM-Uniform [P])."""
    if (
        text.dtype == image.dtype == torch.bfloat16
    ):  # halving commutes with rounding: the same numbers, four times as fast
        return (text + image).mul_(0.5)
    return ((text.float() + image.float()) / 2).to(torch.promote_types(text.dtype, image.dtype))


def beside(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`[n, a]`, `[n, b]` -> `[n, a + b]`: embeddings and heads on the hidden dimension (JAM-Width [A])."""
    return torch.cat((left, right), dim=1)


def twice(rows: torch.Tensor) -> torch.Tensor:
    """`[W, W]`: one parent's row of blocks in JAM-Width, copy [R]: `[[W_text, W_text], [W_image, W_image]]`."""
    return torch.cat((rows, rows), dim=1)


def beside_mean(rows: torch.Tensor, text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """`[W, W_avg]`: one parent's row of blocks in JAM-Width, average [R]: `[[W_text, W_avg], [W_image, W_avg]]`."""
    return torch.cat((rows, average(text, image)), dim=1)


def zeros_right(rows: torch.Tensor, width: int) -> torch.Tensor:
    """`[W, 0]`: the text parent's row of blocks in block-diagonal JAM-Width (ours): `[[W_text, 0], [0, W_image]]`."""
    return torch.cat((rows, rows.new_zeros(rows.shape[0], width)), dim=1)


def zeros_left(rows: torch.Tensor, width: int) -> torch.Tensor:
    """`[0, W]`: the image parent's row of blocks in block-diagonal JAM-Width (ours)."""
    return torch.cat((rows.new_zeros(rows.shape[0], width), rows), dim=1)


def choose(use_image: torch.Tensor, text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Row by row the image parent's or the text parent's; `use_image` is bool `[n]` (JAM-Cross's shared projection
    [P]).
    """
    return torch.where(use_image[:, None], image, text)


def mean_of_present(
    has_text: torch.Tensor, has_image: torch.Tensor, text: torch.Tensor, image: torch.Tensor
) -> torch.Tensor:
    """Row by row the mean, or the one parent's row where the other has none (JAM-Uniform over two vocabularies,
    ours).
    """
    rows = average(text, image)
    rows = torch.where((has_text & ~has_image)[:, None], text.to(rows.dtype), rows)
    return torch.where((has_image & ~has_text)[:, None], image.to(rows.dtype), rows)


def normal(shape: tuple[int, ...], std: float, key: str, first: int, seed: int) -> torch.Tensor:
    """Normal noise, float32, that depends on the seed, the key and the block's first row alone: a fusion can be resumed
    in any order.
    """
    digest = hashlib.sha256(f"{seed}:{key}:{first}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
    return torch.randn(shape, generator=generator).mul_(std)
