"""Seconds of one training step of the quickstart's jam-cross: the recipe's arithmetic against transformers' defaults.

    python modeling_tests/benchmarks/training_step.py

Peer, in the same run and step by step in turn: the same model, batches and optimizer with the attention and the
precision of matrix products that transformers and torch choose by themselves (sdpa, "highest"). It knows no data: ids
are drawn at random, in packed rows as long as the quickstart's. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from jam_hf import JamConfig, JamForCausalLM
from jam_hf.training.muon import MuonAdamW, muon_parameter_groups
from jam_hf.training.recipes import RecipeSettings, fast_arithmetic, freeze


SETTINGS = {
    "defaults": RecipeSettings(),
    "recipe": RecipeSettings(attn_implementation="eager", float32_matmul_precision="medium"),
}


def _model() -> JamForCausalLM:
    vq = {"block_out_channels": (8, 16, 32, 64), "layers_per_block": 1, "latent_channels": 32, "sample_size": 48}
    vq |= {"num_vq_embeddings": 384, "norm_num_groups": 4, "mid_block_add_attention": False}
    text = {"model_type": "llama", "vocab_size": 1084, "hidden_size": 192, "intermediate_size": 512}
    text |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
    torch.manual_seed(0)
    return JamForCausalLM(JamConfig(text_config=text, vq_config=vq))


def _batch(rows: int, documents: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(17, 1084, (rows, documents * length))
    positions = torch.arange(length).repeat(documents).expand(rows, -1)
    return {"input_ids": ids, "position_ids": positions, "labels": ids}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=15, help="steps of each, of which the median counts")
    steps = parser.parse_args().steps
    model = _model()
    freeze(model, "vq")
    optimizer = MuonAdamW(muon_parameter_groups(model, 1e-3, 1e-3, 0.01), lr=1e-3)
    batch = _batch(rows=8, documents=2, length=70)
    seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for number in range(steps + 2):  # the first two warm up
        for name, settings in SETTINGS.items():
            with fast_arithmetic(model, settings):
                start = time.perf_counter()
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if number >= 2:
                    seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {f"{name}_seconds": round(value, 4) for name, value in medians.items()}
    result |= {"ratio": round(medians["recipe"] / medians["defaults"], 3), "steps": steps}
    print(
        json.dumps(
            {"benchmark": "training_step", **result, "threads": torch.get_num_threads(), "torch": torch.__version__}
        )
    )


if __name__ == "__main__":
    main()
