"""What a JAM costs beside the stock decoders that it is made of: forward, forward and backward, and one cached decode
step.

    python modeling_tests/benchmarks/overhead.py

Peers, in the same process and in turn, call by call: a stock causal LM of the same config (uniform and width), and for
cross the two stock parents, text then image. The ratio is the median over the rounds of `JAM seconds / peer seconds` of
one round, so that what else the machine does hits both alike. Heads, losses and positions are computed on both sides.

Uniform and width should take at most 1.03 of their decoder. A cross JAM should take at most 1.10 of its two streams and
its cross blocks by parameters, that is of

    seconds of both parents * (1 + parameters of all cross blocks / parameters of all layers of both parents)

It knows no data: ids are drawn at random, weights too. The last line is JSON; `met` says which goals were met, and the
exit status speaks only of the measurement itself.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedConfig

from jam_hf import JamConfig, JamForCausalLM


GOALS = {"uniform": 1.03, "width": 1.03, "cross": 1.10}
FORMS = {"uniform": "preserving", "width": "preserving", "cross": "preserving", "cross-paper": "paper"}
VOCABULARY, CODES = 2048, 256


def decoder_config(family: str, hidden_size: int, layers: int) -> PreTrainedConfig:
    common = {"vocab_size": VOCABULARY, "hidden_size": hidden_size, "num_hidden_layers": layers, "pad_token_id": 0}
    common |= {"num_attention_heads": hidden_size // 64, "max_position_embeddings": 2048, "tie_word_embeddings": False}
    if family == "llama":
        return LlamaConfig(**common, intermediate_size=hidden_size * 8 // 3 // 64 * 64)
    return OPTConfig(**common, ffn_dim=4 * hidden_size, word_embed_proj_dim=hidden_size, dropout=0.0)


def models(
    family: str, mode: str, form: str, hidden_size: int, layers: int
) -> tuple[JamForCausalLM, list[nn.Module], float]:
    """The JAM, its peers, and the factor for its cross blocks."""
    stock = {"llama": LlamaForCausalLM, "opt": OPTForCausalLM}[family]
    config = decoder_config(family, hidden_size, layers)
    vq = {"block_out_channels": (8, 16, 16, 16), "layers_per_block": 1, "latent_channels": 16, "sample_size": 64}
    vq |= {"num_vq_embeddings": CODES, "norm_num_groups": 4, "mid_block_add_attention": False}
    torch.manual_seed(0)
    jam = JamForCausalLM(
        JamConfig(fusion_mode=mode, cross_form=form, text_config=copy.deepcopy(config), vq_config=vq)
    ).eval()
    peers = [stock(copy.deepcopy(config)).eval() for _ in range(2 if mode == "cross" else 1)]

    def count(model: nn.Module, *parts: str) -> int:
        return sum(p.numel() for name, p in model.named_parameters() if any(part in name for part in parts))

    in_layers = sum(count(peer, ".layers.") for peer in peers)
    return jam, peers, 1 + count(jam, "text_cross.", "image_cross.") / in_layers


def forward(model: nn.Module, ids: torch.Tensor) -> Callable[[], Any]:
    def call() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)

    return call


def backward(model: nn.Module, ids: torch.Tensor) -> Callable[[], Any]:
    def call() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()

    return call


def decode_step(model: nn.Module, ids: torch.Tensor) -> Callable[[], Any]:
    """One new id for every row, behind a cached prefix; the cache is cut back after each."""
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    last = ids[:, -1:]
    mask = torch.ones(ids.shape[0], ids.shape[1] + 1, dtype=torch.int64)

    def call() -> None:
        with torch.no_grad():
            model(input_ids=last, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)

    call.after = lambda: cache.crop(-1)
    return call


def seconds_of(call: Callable[[], Any], times: int, clock: Callable[[], float]) -> float:
    total = 0.0
    for _ in range(times):
        start = clock()
        call()
        total += clock() - start
        if hasattr(call, "after"):
            call.after()
    return total / times


def measure(
    jam: nn.Module, peers: list[nn.Module], rounds: int, ids: torch.Tensor, clock: Callable[[], float]
) -> dict[str, dict[str, float]]:
    """For each part: the median ratio of a round, and the median milliseconds of both sides."""
    found = {}
    for name, part, times in (("forward", forward, 1), ("backward", backward, 1), ("decode_step", decode_step, 16)):
        ours, theirs = part(jam, ids), [part(peer, ids) for peer in peers]
        ratios, own, other = [], [], []
        for number in range(-2, rounds):  # the first two warm up; who goes first takes turns
            if number % 2:
                other_seconds = sum(seconds_of(call, times, clock) for call in theirs)
                own_seconds = seconds_of(ours, times, clock)
            else:
                own_seconds = seconds_of(ours, times, clock)
                other_seconds = sum(seconds_of(call, times, clock) for call in theirs)
            if number >= 0:
                ratios.append(own_seconds / other_seconds)
                own.append(own_seconds)
                other.append(other_seconds)
        found[name] = {
            "ratio": statistics.median(ratios),
            "milliseconds": 1e3 * statistics.median(own),
            "peer_milliseconds": 1e3 * statistics.median(other),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each measurement, of which the median counts")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="tokens a row; there are two rows")
    parser.add_argument("--modes", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--families", nargs="+", choices=("llama", "opt"), default=["llama", "opt"])
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="one thread, and its processor time: for a machine that others use",
    )
    arguments = parser.parse_args()
    clock = time.process_time if arguments.processor_time else time.perf_counter
    if arguments.processor_time:
        torch.set_num_threads(1)
    ids = torch.randint(17, VOCABULARY - CODES, (2, arguments.length), generator=torch.Generator().manual_seed(0))
    result: dict[str, Any] = {"ratios": {}, "goals": GOALS, "met": {}, "milliseconds": {}, "cross_block_factor": {}}
    for family in arguments.families:
        for name in arguments.modes:
            mode = name.partition("-")[0]
            jam, peers, factor = models(family, mode, FORMS[name], arguments.hidden_size, arguments.layers)
            found = measure(jam, peers, arguments.rounds, ids, clock)
            if not all(math.isfinite(value) and value > 0 for part in found.values() for value in part.values()):
                raise SystemExit(f"broken measurement of {family} {name}: {found}")
            key = f"{family}-{name}"
            result["ratios"][key] = {part: round(values["ratio"] / factor, 3) for part, values in found.items()}
            result["met"][key] = all(values["ratio"] / factor <= GOALS[mode] for values in found.values())
            result["milliseconds"][key] = {
                part: [round(values["milliseconds"], 2), round(values["peer_milliseconds"], 2)]
                for part, values in found.items()
            }
            if mode == "cross":
                result["cross_block_factor"][key] = round(factor, 3)
            del jam, peers
            print(key, result["ratios"][key], flush=True)
    result |= {"rounds": arguments.rounds, "hidden_size": arguments.hidden_size, "layers": arguments.layers}
    result |= {"clock": "processor" if arguments.processor_time else "wall"}
    result |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps({"benchmark": "overhead", **result}))


if __name__ == "__main__":
    main()
