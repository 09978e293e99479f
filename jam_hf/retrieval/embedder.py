"""Texts and pictures to vectors, by CLIP. It knows no index, no JAM and no token ids of one.

Shape suffixes: B queries or documents, D size of an embedding.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.utils import cached_file

from ..integrations.private import extract_commit_hash
from ..reading import read_clip


DEFAULT_EMBEDDER = "openai/clip-vit-base-patch32"  # CLIP ViT-B/32 [C]


class Embedder(Protocol):
    """What an index asks of an embedder.

    name, revision: by which it is found again. fingerprint: by which it is told from others. size: D.
    """

    name: str
    revision: str | None
    fingerprint: str
    size: int

    def embed(self, texts: Sequence[str | None], images: Sequence[Sequence[Image.Image]]) -> np.ndarray:
        """float32 `[B, D]` of length 1, of B texts (or None) and the pictures of each (or none)."""
        ...


class ClipEmbedder:
    """CLIP's text and image models, and the mean of the two embeddings [C].

    Text and picture are scaled to length 1 before the mean, and the mean after it; a query with several pictures has
    the mean of theirs (ours [R]: a score is then at most 1, which a threshold of 0.9 supposes). Texts are cut at CLIP's
    77 tokens.

    Args:
        name (`str`): folder or Hub id of a CLIP model with tokenizer and image processor, in safetensors.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        device: where it runs.
    Raises:
        ValueError: if there is no such CLIP model.
    """

    def __init__(self, name: str = DEFAULT_EMBEDDER, revision: str | None = None, device: Any = None):
        self.name = os.fspath(name)
        try:
            self.model, self.tokenizer, self.image_processor = read_clip(self.name, revision=revision)
        except Exception as error:  # of the file system, the Hub, safetensors or json
            raise ValueError(
                f"The embedder '{name}' cannot be read as a CLIP model: {error} Expected the folder or Hub id of one, "
                "with its tokenizer and image processor."
            ) from error
        self.model.requires_grad_(False).eval().to(device)
        self.revision = extract_commit_hash(cached_file(self.name, "config.json", revision=revision), None) or revision
        self.size = self.model.config.projection_dim
        self.fingerprint = fingerprint(self.model.text_projection.weight, self.model.visual_projection.weight)

    @torch.no_grad()
    def embed(self, texts: Sequence[str | None], images: Sequence[Sequence[Image.Image]]) -> np.ndarray:
        """Texts and pictures to vectors.

        Args:
            texts: B texts; `None` (or blank) where there is none.
            images: for each, its pictures, possibly none.
        Returns:
            float32 `[B, D]`, each of length 1.
        Raises:
            ValueError: if the two are not of one length, or neither text nor picture is given.
        """
        if len(texts) != len(images):
            raise ValueError(f"embed: {len(texts)} texts and {len(images)} lists of pictures; expected as many.")
        parts: list[list[torch.Tensor]] = [[] for _ in texts]
        with_text = [i for i, text in enumerate(texts) if text is not None and text.strip()]
        if with_text:
            tokens = self.tokenizer(
                [texts[i] for i in with_text],
                padding=True,
                truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            )
            states = self.model.get_text_features(**tokens.to(self.model.device)).pooler_output
            for i, embedding in zip(with_text, F.normalize(states.float(), dim=-1)):
                parts[i].append(embedding)
        if flat := [picture for pictures in images for picture in pictures]:
            pixels = self.image_processor(flat, return_tensors="pt").to(self.model.device)
            states = self.model.get_image_features(**pixels).pooler_output
            each = F.normalize(states.float(), dim=-1).split([len(pictures) for pictures in images])
            for part, embeddings in zip(parts, each):
                if len(embeddings):
                    part.append(F.normalize(embeddings.mean(0), dim=-1))
        if empty := [i for i, part in enumerate(parts) if not part]:
            raise ValueError(f"Nothing to embed in number {empty[0]}: expected a text, a picture or both.")
        return F.normalize(torch.stack([torch.stack(part).mean(0) for part in parts]), dim=-1).cpu().numpy()


def embedded(embedder: Embedder, texts: Sequence[str | None], images: Sequence[Sequence[Image.Image]]) -> np.ndarray:
    """What the embedder makes of B queries or documents, float32 `[B, D]`.

    Raises:
        ValueError: if it is not what [`Embedder`] says: a search would find others than the similar ones.
    """
    vectors = np.asarray(embedder.embed(texts, images), dtype=np.float32)
    if vectors.shape != (len(texts), embedder.size):
        raise ValueError(
            f"The embedder '{embedder.name}' gave an array {list(vectors.shape)} for {len(texts)} inputs; expected "
            f"{[len(texts), embedder.size]}."
        )
    lengths = np.linalg.norm(vectors, axis=1)
    of_length_one = np.abs(lengths - 1) < 1e-2  # false for NaN too; half precision is 1e-3 off
    if not of_length_one.all():
        wrong = int(np.argmin(of_length_one))
        raise ValueError(
            f"The embedder '{embedder.name}' gave a vector of length {lengths[wrong]} for input {wrong}; expected "
            "length 1, as the scores are inner products. Divide by the length."
        )
    return vectors


def fingerprint(*weights: torch.Tensor) -> str:
    """Digest of tensors, by which a model is told from others; the same on every device."""
    digest = hashlib.sha256()
    for weight in weights:
        array = weight.detach().to("cpu", torch.float32).contiguous().numpy()
        digest.update(f"{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
