"""Time and peak memory of a fusion, beside mergekit's linear merge of the same two parents and a plain copy of the
output.

    python modeling_tests/benchmarks/fusion.py --work runs/fusion-benchmark --mergekit path/to/mergekit-yaml

Two bf16 Llamas of 1.1B parameters (random weights, made once in the work folder, 4.1 GiB) are fused as uniform, width
and cross by `jam-hf fuse`, each a process of its own, start and imports included; mergekit likewise, in whatever
environment its command lies. Copies are made by `cp`, and sync. Rounds are interleaved; medians. It ends with one line
of JSON: seconds, peak resident MiB, ratios to mergekit and to the copies. Without --mergekit there is nothing of it.
The outputs are removed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from jam_hf import JamVQConfig, JamVQModel
from jam_hf.training.tokenizer import train_tokenizer


NUM_CODES = 64
SIZES = {
    "1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
}


def make_parents(work: Path, size: str) -> None:
    tokenizer = train_tokenizer(["a small red circle"], 300, NUM_CODES)
    config = LlamaConfig(
        vocab_size=32000, num_key_value_heads=4, max_position_embeddings=2048, dtype="bfloat16", **SIZES[size]
    )
    for seed, name in ((1, "text"), (2, "image")):
        folder = work / name
        if (folder / "config.json").is_file():
            continue
        torch.manual_seed(seed)
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    if not (work / "vq").is_dir():
        JamVQModel(
            JamVQConfig(
                block_out_channels=(8, 8),
                layers_per_block=1,
                latent_channels=4,
                sample_size=16,
                num_vq_embeddings=NUM_CODES,
                norm_num_groups=4,
                mid_block_add_attention=False,
            )
        ).save_pretrained(work / "vq")


def timed(command: list[str]) -> tuple[float, float]:
    """(seconds, peak resident MiB) of a process."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        errors = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {errors.decode()[-2000:]}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/fusion-benchmark"))
    parser.add_argument("--mergekit", help="mergekit's command mergekit-yaml")
    parser.add_argument("--size", choices=SIZES, default="1.1b")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    make_parents(work, args.size)
    out, copy = work / "out", work / "copy"
    recipe = work / "linear.yaml"
    parents = [{"model": str(work / name), "parameters": {"weight": 0.5}} for name in ("text", "image")]
    recipe.write_text(json.dumps({"merge_method": "linear", "models": parents, "dtype": "bfloat16"}))
    fuse = [
        str(Path(sys.executable).with_name("jam-hf")),
        "fuse",
        "--text",
        str(work / "text"),
        "--image",
        str(work / "image"),
    ]
    commands = {
        mode: [*fuse, "--vq", str(work / "vq"), "--mode", mode, "--output", str(out)]
        for mode in ("uniform", "width", "cross")
    }
    if args.mergekit:
        commands["mergekit"] = [args.mergekit, str(recipe), str(out)]
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, list[float]] = {}
    for index in range(args.rounds):
        for name, command in commands.items():
            for folder in (out, copy):
                shutil.rmtree(folder, ignore_errors=True)
            os.sync()
            took, peak = timed(command)
            seconds.setdefault(name, []).append(took)
            peaks.setdefault(name, []).append(peak)
            os.sync()
            start = time.perf_counter()
            timed(["cp", "-r", str(out), str(copy)])
            os.sync()  # a fusion's files lie on the disk when it ends, too
            seconds.setdefault(f"copy of {name}", []).append(time.perf_counter() - start)
            print(
                f"round {index + 1}: {name} {took:.1f} s, {peak:.0f} MiB; copy {seconds[f'copy of {name}'][-1]:.1f} s"
            )
    for folder in (out, copy):
        shutil.rmtree(folder, ignore_errors=True)
    medians = {name: round(statistics.median(values), 2) for name, values in seconds.items()}
    memory = {name: round(statistics.median(values)) for name, values in peaks.items()}
    result = {"benchmark": "fusion", "size": args.size, "rounds": args.rounds, "seconds": medians, "peak_mib": memory}
    result["to_copy"] = {mode: round(medians[mode] / medians[f"copy of {mode}"], 2) for mode in commands}
    if args.mergekit:
        result["uniform_to_mergekit"] = {
            "seconds": round(medians["uniform"] / medians["mergekit"], 2),
            "peak": round(memory["uniform"] / memory["mergekit"], 2),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
