"""`generate_batch` against `generate` on the same requests, in turn: as it is, and by transformers' pages.

    python modeling_tests/benchmarks/continuous_batching.py [--rounds 5] [--hidden 256] [--requests 8]

Requests of one length, then of unlike ones (where `generate` pads, and goes on until the longest is done). A ratio
above 1: `generate_batch` takes longer. The last line is JSON: the median of the ratios of rounds for each case, and
what the parts took.
"""

import argparse
import json
import statistics
import time

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig

from jam_hf import JamConfig, JamForCausalLM


CODES, BREAK, EOS = 256, 3, 2


def model_of(hidden: int) -> JamForCausalLM:
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=EOS,
    )
    vq = {"block_out_channels": (8, 8, 8), "sample_size": 32, "num_vq_embeddings": CODES, "norm_num_groups": 4}
    return JamForCausalLM(JamConfig(text_config=text.to_dict(), vq_config=vq)).eval()


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    ids = [[0] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def seconds(call) -> tuple[float, float]:
    """On the clock, and of the processor: with one thread the latter is what a quiet machine would take."""
    start, of_processor = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - of_processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--new", type=int, default=72)
    arguments = parser.parse_args()
    model = model_of(arguments.hidden)
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: [1, *torch.randint(20, 3000, (n,), generator=generator).tolist()]  # noqa: E731
    cases = {
        "text, equal": ("text", [draw(20) for _ in range(arguments.requests)]),
        "text, unequal": ("text", [draw(8 * (i + 1)) for i in range(arguments.requests)]),
        "a picture each": ("image", [draw(20) for _ in range(arguments.requests)]),
    }
    found = {}
    for name, (mode, prompts) in cases.items():
        settings = {"do_sample": False, "generation_mode": mode, "eos_token_id": EOS}
        new = {"min_new_tokens": arguments.new} if mode == "text" else {}
        # Text of a fixed length for both: an end that never comes, which generate_batch has as -1.
        plain = GenerationConfig(max_new_tokens=arguments.new, pad_token_id=0, **settings, **new)
        batch = GenerationConfig(max_new_tokens=arguments.new, **(settings | {"eos_token_id": -1 if new else EOS}))
        inputs = padded(prompts)
        one = lambda: model.generate(**inputs, generation_config=plain)  # noqa: B023, E731
        many = lambda: model.generate_batch(prompts, batch)  # noqa: B023, E731
        paged = lambda: model.generate_batch(prompts, batch, ContinuousBatchingConfig(page_size=32))  # noqa: B023, E731
        calls = (one, many, paged)
        for call in calls:
            call()
        rounds = [[seconds(call) for call in calls] for _ in range(arguments.rounds)]
        found[name] = {}
        for index, way in enumerate(("ratio", "ratio_of_pages"), start=1):
            found[name][way] = round(statistics.median(times[index][0] / times[0][0] for times in rounds), 3)
            found[name][f"processor_{way}"] = round(
                statistics.median(times[index][1] / times[0][1] for times in rounds), 3
            )
        found[name]["generate_s"] = round(statistics.median(times[0][0] for times in rounds), 3)
        print(name, found[name], flush=True)
    print(json.dumps({"benchmark": "continuous_batching", "requests": arguments.requests, "cases": found}))


if __name__ == "__main__":
    main()
