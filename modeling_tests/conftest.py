"""Tiny parents, made offline once per session on the CPU, and the JAMs that they become."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import jam_hf
from jam_hf import JamForCausalLM, JamProcessor, JamVQConfig, JamVQModel
from jam_hf.training.tokenizer import train_tokenizer


pytest_plugins = ["deprecations", "feature_report", "heap", "nightly", "pytester"]

torch.set_num_threads(1)  # the models are tiny, and the tests run side by side

NUM_CODES = 16
VQ_SETTINGS = {
    "block_out_channels": (8, 8, 8),
    "layers_per_block": 1,
    "latent_channels": 4,
    "sample_size": 16,
    "num_vq_embeddings": NUM_CODES,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
}
FAMILIES = ("llama", "llama-tied", "opt", "opt-paper", "opt-projected")
FUSIONS = (
    ("uniform", "average"),
    ("width", "copy"),
    ("width", "average"),
    ("width", "block_diagonal"),
    ("cross", "paper"),
    ("cross", "preserving"),
)


def randomise(model: torch.nn.Module, seed: int, std: float = 0.2) -> None:
    """Weights that leave nothing at zero or one, so that no comparison is vacuous."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * std if parameter.dim() > 1 else parameter + 0.1 * noise)


def parent_model(family: str, vocab_size: int, seed: int, **changes) -> torch.nn.Module:
    common = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family.startswith("llama"):
        settings = {"intermediate_size": 48, "num_key_value_heads": 2, "tie_word_embeddings": family == "llama-tied"}
        model = LlamaForCausalLM(LlamaConfig(**{**common, **settings, **changes}))
    else:
        settings = {"ffn_dim": 48, "dropout": 0.0}
        if family == "opt-paper":
            settings |= {"enable_bias": False, "layer_norm_elementwise_affine": False}
        if family == "opt-projected":
            settings |= {"word_embed_proj_dim": 16}
        model = OPTForCausalLM(OPTConfig(**{**common, **settings, **changes}))
    randomise(model, seed)
    return model.eval()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shuffle", type=int, metavar="SEED", help="run the files, and the tests of each, in another order"
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (seed := config.getoption("--shuffle")) is not None:
        draw = random.Random(seed)
        draw.shuffle(items)
        places = {path: draw.random() for path in sorted({item.path for item in items})}
        items.sort(key=lambda item: places[item.path])


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(["a small red circle in the top left", "a ruby is red"], 300, NUM_CODES)


@pytest.fixture(scope="session")
def vq():
    torch.manual_seed(0)
    model = JamVQModel(JamVQConfig(**VQ_SETTINGS)).eval()
    with torch.no_grad():  # codes far apart, so that no near tie decides
        model.vq.quantize.embedding.weight.normal_(generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture(scope="session")
def parents(tmp_path_factory, tokenizer):
    """`parents(family)` -> folders of a text and an image parent, each with the tokenizer."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(family: str) -> tuple[Path, Path]:
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            for seed, role in ((1, "text"), (2, "image")):
                parent_model(family, len(tokenizer), seed).save_pretrained(root / role)
                tokenizer.save_pretrained(root / role)
            made[family] = (root / "text", root / "image")
        return made[family]

    return make


@pytest.fixture(scope="session")
def fused(tmp_path_factory, parents, vq):
    """`fused(family, mode, init)` -> folder of the JAM."""
    made: dict[tuple[str, str, str], Path] = {}

    def make(family: str, mode: str, init: str) -> Path:
        key = (family, mode, init)
        if key not in made:
            text, image = parents(family)
            made[key] = jam_hf.fuse(text, image, mode, tmp_path_factory.mktemp("jam") / "jam", init=init, vq_model=vq)
        return made[key]

    return make


@pytest.fixture(scope="session")
def loaded(fused):
    """The models of `jam`, each loaded once; whoever changes one copies it first."""
    made: dict[tuple[str, str, str, bool], JamForCausalLM] = {}

    def load(family: str, mode: str, init: str, alive: bool) -> JamForCausalLM:
        key = (family, mode, init, alive and mode == "cross")
        if key not in made:
            made[key] = JamForCausalLM.from_pretrained(fused(family, mode, init)).eval()
            if key[-1]:
                generator = torch.Generator().manual_seed(3)
                with torch.no_grad():
                    for name, parameter in made[key].named_parameters():
                        if "_cross." in name and parameter.dim() > 1:
                            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        return made[key]

    return load


@pytest.fixture
def jam(loaded):
    """`jam(family, mode, init, alive=True)` -> model; alive: zero-initialised outputs get weights, so that all
    counts.
    """
    return lambda family, mode, init, alive=True: copy.deepcopy(loaded(family, mode, init, alive))


@pytest.fixture
def processor(fused):
    return JamProcessor.from_pretrained(fused("llama", "cross", "preserving"))


def same_picture(one: Image.Image, other: Image.Image) -> bool:
    """Equal but for one level of 255: a VQ model rounds otherwise in a batch of another size, on some machines."""
    left, right = (np.asarray(picture).astype(int) for picture in (one, other))
    return one.mode == other.mode and left.shape == right.shape and bool((abs(left - right) <= 1).all())


def random_ids(model: JamForCausalLM, rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Text and image ids in a random mix, without markup."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(17, model.config.vocab_size, (rows, length), generator=generator)
