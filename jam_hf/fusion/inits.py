"""The maths of fusion: short pure functions on tensors. They know nothing of keys, files or models.

Shapes: a parent's linear weight is `[out, in]`, an embedding `[V, d]`, a norm or bias `[d]`.
"""

from __future__ import annotations

import hashlib

import torch


def average(text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Mean of the two parents, taken in float32 (JAM-Uniform [P])."""
    return ((text.float() + image.float()) / 2).to(text.dtype)


def width_copy(text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """`[[W_text, W_text], [W_image, W_image]]`: `[out, in]` twice -> `[2 out, 2 in]` (JAM-Width, copy [R])."""
    return torch.cat((torch.cat((text, text), dim=1), torch.cat((image, image), dim=1)), dim=0)


def width_average(text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """`[[W_text, W_avg], [W_image, W_avg]]` (JAM-Width, average [R])."""
    mean = average(text, image)
    return torch.cat((torch.cat((text, mean), dim=1), torch.cat((image, mean), dim=1)), dim=0)


def width_block_diagonal(text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """`[[W_text, 0], [0, W_image]]`: each half computes what its parent computed (ours; the norms still see both halves)."""
    return torch.block_diag(text, image)


def concat_rows(text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Concatenation of vectors, or of rows: norms and biases of JAM-Width [A]."""
    return torch.cat((text, image), dim=0)


def concat_columns(text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """`[V, d]` twice -> `[V, 2 d]`: embeddings on the hidden dimension [A]."""
    return torch.cat((text, image), dim=1)


def splice_rows(text: torch.Tensor, image: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Rows `[first, last)` of the image parent, all others of the text parent (shared projection of JAM-Cross [P])."""
    return torch.cat((text[:first], image[first:last], text[last:]), dim=0)


def normal(shape: torch.Size, std: float, key: str, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal noise that depends on the seed and the key alone, so that a fusion can be resumed in any order."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
    return (torch.randn(shape, generator=generator) * std).to(dtype)
