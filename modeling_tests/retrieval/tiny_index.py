"""Small embedders, pairs and a JAM, from which the retrieval tests make indexes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from conftest import randomise
from model.test_picture_layout import LAYOUTS, G, layout_config, layout_processor
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from jam_hf import JamForCausalLM
from jam_hf.generation.retrieval_prompts import PromptDocument


N, OFFSET = G * G, 300
WORDS = ("red", "blue", "green", "circle", "square", "star", "small", "large")


def tiny_clip(folder: Path, seed: int = 0) -> Path:
    """A random CLIP of 32-pixel pictures, saved with a tokenizer of letters and an image processor."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **sizes,
            "vocab_size": len(pieces),
            "max_position_embeddings": 77,
            "eos_token_id": 1,
            "bos_token_id": 0,
            "pad_token_id": 1,
        },
        vision_config={**sizes, "image_size": 32, "patch_size": 16},
        projection_dim=12,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config)
    randomise(model, seed=seed, std=0.8)  # so that embeddings lie apart
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


class TableEmbedder:
    """Of a text, or of the mean colour of pictures, a random direction; what is in `table` lies where that says."""

    name, revision, fingerprint = "table", None, "of a table"

    def __init__(self, size: int = 6, table: dict[str, np.ndarray] | None = None):
        self.size, self.table = size, table or {}

    def vector(self, key: str) -> np.ndarray:
        if key in self.table:
            vector = np.asarray(self.table[key], dtype=np.float32)
        else:
            seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
            vector = np.random.default_rng(seed).standard_normal(self.size).astype(np.float32)
        return vector / np.linalg.norm(vector)

    def embed(self, texts, images) -> np.ndarray:
        return np.stack([self.vector(text or f"{len(pictures)} pictures") for text, pictures in zip(texts, images)])


def layout_jam(name: str = "plain", mode: str = "uniform", **settings) -> JamForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of what is not drawn below
        model = JamForCausalLM(layout_config(LAYOUTS[name], mode=mode, **settings))
    randomise(model, seed=4)
    with torch.no_grad():
        model.model.vq_model.vq.quantize.embedding.weight.normal_(generator=torch.Generator().manual_seed(1))
    return model.eval()


def processor_for(tokenizer, name: str = "plain"):
    return layout_processor(tokenizer, name)


def noise(seed: int, size: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def pairs(count: int, seed: int = 0) -> list[dict]:
    """Captions that all differ, and pictures of noise."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        words = " ".join(rng.choice(WORDS, 3))
        name = "abcdefghijklmnopqrstuvwxyz"[number % 26] * (number // 26 + 1)
        rows.append({"text": f"{words} {name}", "image": noise(seed * 1000 + number)})
    return rows


def document(name: str, text_ids: list[int], first_code: int, score: float = 0.5) -> PromptDocument:
    return PromptDocument(name, score, text_ids, [(first_code + 3 * i) % 16 for i in range(N)])
