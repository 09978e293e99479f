"""What writing costs: guided pictures, documents, the grammar, memory of guidance, compiled steps, and pictures on a
GPU.

    python modeling_tests/benchmarks/decoding.py            # all that the machine has, under 40 minutes on 2 quiet
    cores python modeling_tests/benchmarks/decoding.py --quick    # small pictures, under 2 minutes

Models: Llama trunks with random weights, 32,000 text ids and 8,192 codes, pictures of 1,024 codes. The peer of a
uniform JAM is a stock LlamaForCausalLM that holds the same modules, guided as stock `generate(guidance_scale=3)`
guides. A cross JAM (--models d512-cross) has no stock decoder; its peer is itself without a grammar, guided by the same
stock logits processor.

Cases and goals (ours / peer, as many tokens on both sides, sampled; prompts of 64 tokens):
  guided     a picture, `generate(generation_mode="image", guidance_scale=3)`: 0.60 in bfloat16, 0.85 in float32.
  document   as many text tokens as codes; the peer is guided all along, as the stock one cannot do otherwise: 0.55 in
  bfloat16. machinery  unguided, each mode against the peer's unguided step, and against our own `generation_mode=None`:
  1.03. Also
             measured from within, as calls differ by more than that: the part of a step that is the machinery's, 0.03.
  memory     keys and values alive at the end of a picture, after a prompt of 1,000 tokens: guidance may add those of
             its short context, `<bos> <mask> <break>` and the codes, and the room of a block of the cache.
  compiled   a static cache and a compiled step, warm, against our own eager one: the factor, without a goal.
  gpu        seconds per guided picture at 1B and 7B shapes in bfloat16, and against reading the weights once per code.

Steps are timed one by one in the middle of a picture: their cost grows linearly with the position, so the middle is the
mean. `--whole` writes whole pictures and documents instead, and times the calls. Every round times both sides, who goes
first takes turns, and the ratio is the median over the rounds. It knows no data. The last line is JSON; `met` says
which goals were met,
and the exit status speaks only of the measurement itself. Where others compute, threads wait long for each other: use
`--processor-time`.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from decoding_parts import BREAK, CODES, SHAPES, TEXT, PictureAt, Share, StepClock, StopAt, make
from torch import nn
from transformers import CompileConfig, UnbatchedClassifierFreeGuidanceLogitsProcessor

from jam_hf import JamForCausalLM
from jam_hf.generation.picture_steps import PictureSteps
from jam_hf.model.grammar_jam import GENERATION_MODES
from jam_hf.model.logits_process_jam import PictureGrammarLogitsProcessor


BLOCK, PROMPT, LONG_PROMPT, SCALE = 256, 64, 1000, 3.0
CASES = ("guided", "document", "machinery", "memory", "compiled", "gpu")
GOALS = {"guided bfloat16": 0.60, "guided float32": 0.85, "document bfloat16": 0.55}
GOALS |= {"machinery bfloat16": 1.03, "machinery float32": 1.03}
FULL = {"models": ("d512", "100m"), "batches": (1, 8), "codes": 1024, "steps": 16, "rounds": 3}
QUICK = {"models": ("d512",), "batches": (1,), "codes": 64, "steps": 12, "rounds": 3}

Side = list[Callable[[], float]]  # what a side takes is the mean of its calls


class Bench:
    """A JAM and its peer at one batch size: the calls that the cases are made of."""

    def __init__(self, made: tuple[JamForCausalLM, nn.Module], batch: int, arguments: argparse.Namespace):
        self.jam, self.peer = made
        self.batch, self.codes, self.whole, self.steps = batch, arguments.codes, arguments.whole, arguments.steps
        self.clock = time.process_time if arguments.processor_time else time.perf_counter

    def prompt(self, text: int, picture: int | None = None) -> torch.Tensor:
        """`text` text ids and, where `picture` is a number, `<break>` and so many codes; int64 `[B, T]`."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(600, TEXT, (self.batch, text), generator=generator)
        if picture is not None:
            codes = torch.randint(TEXT, TEXT + CODES, (self.batch, picture), generator=generator)
            ids = torch.cat((ids, torch.full((self.batch, 1), BREAK), codes), dim=1)
        return ids.to(self.jam.device)

    def write(self, model: nn.Module, prompt: torch.Tensor, new: int, **settings: Any) -> float:
        """Seconds per token: of the median step among `new`, or the mean of the whole call."""
        steps = StepClock(self.clock)
        settings = {"max_length": PROMPT + 2 * self.codes + 8, "do_sample": True, "top_k": 0, **settings}
        settings["stopping_criteria"] = [StopAt(prompt.shape[1] + new)]
        torch.manual_seed(0)
        start = self.clock()
        model.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=steps, **settings)
        return (self.clock() - start) / new if self.whole else steps.seconds()

    def ours(self, prompt: torch.Tensor, new: int, mode: str | None, scale: float | None, **settings: Any) -> float:
        return self.write(self.jam, prompt, new, generation_mode=mode, guidance_scale=scale, **settings)

    def theirs(self, prompt: torch.Tensor, new: int, guided: bool) -> float:
        """The stock unconditional branch starts at the last token of the prompt, and has seen what was written
        behind it.
        """
        settings: dict[str, Any] = {"generation_mode": None} if self.peer is self.jam else {}
        if guided:
            seen = prompt[:, min(PROMPT, prompt.shape[1] - 1) :]
            processor = UnbatchedClassifierFreeGuidanceLogitsProcessor(SCALE, self.peer, unconditional_ids=seen)
            settings["logits_processor"] = [processor]
        return self.write(self.peer, prompt, new, **settings)

    # ----- cases: what is timed in turn, by name ----------------------------------------------------------------------

    def guided(self) -> dict[str, Side]:
        start, new = (0, self.codes) if self.whole else (self.codes // 2, self.steps)
        prompt = self.prompt(PROMPT, start)
        return {
            "ours": [lambda: self.ours(prompt, new, "image", SCALE)],
            "stock": [lambda: self.theirs(prompt, new, True)],
        }

    def document(self) -> dict[str, Side]:
        opens = {"logits_processor": [PictureAt(PROMPT + self.codes)]}
        prompts, new = [self.prompt(PROMPT)], 2 * self.codes + 1
        if not self.whole:
            prompts = [self.prompt(PROMPT + self.codes // 2), self.prompt(PROMPT + self.codes, self.codes // 2)]
            new = self.steps
        ours = [lambda ids=ids: self.ours(ids, new, "interleaved", SCALE, **opens) for ids in prompts]
        return {"ours": ours, "stock": [lambda ids=ids: self.theirs(ids, new, True) for ids in prompts]}

    def machinery(self) -> dict[str, Side]:
        start, new = (0, self.codes) if self.whole else (self.codes // 2, 4 * self.steps)
        text, picture = self.prompt(PROMPT + start), self.prompt(PROMPT, start)
        sides: dict[str, Side] = {"stock": [lambda: self.theirs(text, new, False)]}
        for mode in (None, *GENERATION_MODES):
            ids = picture if mode == "image" else text
            sides[str(mode)] = [lambda ids=ids, mode=mode: self.ours(ids, new, mode, None)]
        return sides

    def machinery_share(self) -> dict[str, float]:
        """By mode, what the grammar, the reading of states and the choice of the head's rows take of an unguided
        step.
        """
        methods = [(PictureGrammarLogitsProcessor, "__call__"), (PictureSteps, "prepare"), (PictureSteps, "take")]
        found = {}
        for mode in GENERATION_MODES:
            ids = self.prompt(PROMPT, self.codes // 2) if mode == "image" else self.prompt(PROMPT + self.codes // 2)
            with Share(methods, self.clock) as share:
                step = self.ours(ids, 4 * self.steps, mode, None)
            found[f"part of a step, {mode}"] = round(share.of(step), 4)
        return found

    def compiled(self) -> dict[str, Side]:
        prompt, sides = self.prompt(PROMPT, self.codes // 2), {}
        for part, scale in (("unguided", None), ("guided", SCALE)):
            for way, more in (("eager", {}), ("compiled", self.static_and_compiled())):
                sides[f"{part} {way}"] = [
                    lambda scale=scale, more=more: self.ours(prompt, self.steps, "image", scale, **more)
                ]
        return sides

    def static_and_compiled(self) -> dict[str, Any]:
        config = CompileConfig(fullgraph=False, dynamic=False, mode="default")
        config._compile_all_devices = True  # on a CPU too
        return {"max_length": PROMPT + self.codes + 8, "cache_implementation": "static", "compile_config": config}

    @staticmethod
    def rounds(sides: dict[str, Side], rounds: int) -> dict[str, list[float]]:
        """Seconds per token of each side in each round; who goes first takes turns."""
        found: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(rounds):
            for name in list(sides)[:: -1 if number % 2 else 1]:
                found[name].append(statistics.mean(call() for call in sides[name]))
        if not all(math.isfinite(value) and value > 0 for values in found.values() for value in values):
            raise SystemExit(f"broken measurement: {found}")
        return found

    # ----- memory -----------------------------------------------------------------------------------------------------

    def cached_bytes(self, scale: float | None) -> int:
        """Bytes of the tensors of four dimensions and more (keys, values, masks) that are alive because of a call, at
        the last code but few of a picture after a long prompt.
        """
        prompt, found = self.prompt(LONG_PROMPT, self.codes - 8), []
        before = set(_live_storages())

        def count() -> None:
            found.append(sum(size for place, size in _live_storages().items() if place not in before))

        settings: dict[str, Any] = {"stopping_criteria": [StopAt(prompt.shape[1] + 6, count)], "do_sample": False}
        settings |= {"max_new_tokens": self.codes + 2, "generation_mode": "image", "guidance_scale": scale}
        self.jam.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        return found[-1]

    def memory(self) -> dict[str, Any]:
        """Megabytes with and without guidance; `limit`: what the short context may add."""
        plain, guided = self.cached_bytes(None), self.cached_bytes(SCALE)
        attentions = self.jam.config.per_layer_config
        token = sum(2 * c.num_key_value_heads * c.hidden_size // c.num_attention_heads for c in attentions)
        token *= self.batch * self.jam.dtype.itemsize
        sizes = {"unguided": plain, "guided": guided, "added": guided - plain}
        sizes |= {"limit": token * (3 + self.codes + BLOCK), "a second prompt": token * (LONG_PROMPT + 1 + self.codes)}
        return {name: round(size / 2**20, 2) for name, size in sizes.items()}


def _live_storages() -> dict[int, int]:
    """Place and bytes."""
    tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor and thing.dim() >= 4]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def seconds_of(call: Callable[[], Any], device: str) -> float:
    for wait in (True, False):
        if device != "cpu":
            torch.cuda.synchronize()
        if wait:
            start = time.perf_counter()
            call()
    return time.perf_counter() - start


def copied_per_second(device: str) -> float:
    """Bytes read and written by a copy of a gigabyte."""
    source = torch.ones(2**28, device=device)
    target = torch.empty_like(source)
    copies = [seconds_of(lambda: target.copy_(source), device) for _ in range(12)]
    return 2 * source.nbytes / statistics.median(copies[2:])


def pictures_on(device: str, shape: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds per guided picture in bfloat16, eager and compiled, and against reading the weights once per code."""
    bench = Bench(make(shape, torch.bfloat16, arguments.codes, device), 1, arguments)
    decoder, head = bench.jam.model.language_model, bench.jam.lm_head
    read = sum(p.nbytes for p in decoder.layers.parameters()) + head.weight.nbytes  # of the embedding: one row
    bandwidth = copied_per_second(device)
    result: dict[str, Any] = {"weights_gb": round(read / 1e9, 3), "copy_gb_per_second": round(bandwidth / 1e9, 1)}
    least = read / bandwidth * arguments.codes
    result["seconds_reading_weights"] = round(least, 3)
    prompt = bench.prompt(PROMPT, 0)
    for way, more in (("eager", {}), ("compiled", bench.static_and_compiled())):

        def draw(more: dict[str, Any] = more) -> None:
            bench.ours(prompt, arguments.codes, "image", SCALE, **more)

        seconds = statistics.median([seconds_of(draw, device) for _ in range(arguments.rounds + 1)][1:])
        result[way] = {"seconds_per_picture": round(seconds, 2), "over_reading_weights": round(seconds / least, 2)}
    return result


def measure(bench: Bench, case: str, dtype: str, rounds: int) -> tuple[dict[str, Any], dict[str, bool]]:
    """What was found (milliseconds per token, medians of ratios within a round), and which ratios met their goal."""
    if case == "memory":
        found = bench.memory()
        return found, {"added": found["added"] <= found["limit"]}
    sides = getattr(bench, case)()
    if case == "compiled":  # the first call compiles
        bench.rounds(sides, 1)
    seconds = bench.rounds(sides, rounds)
    names = [name for name in seconds if name not in ("stock", "ours")]
    pairs = {
        "guided": [("ours", "stock")],
        "document": [("ours", "stock")],
        "machinery": [(name, "stock") for name in names] + [(name, "None") for name in names if name != "None"],
        "compiled": [(f"{part} eager", f"{part} compiled") for part in ("unguided", "guided")],
    }[case]
    ratios = {
        f"{one} / {other}": round(statistics.median(a / b for a, b in zip(seconds[one], seconds[other])), 3)
        for one, other in pairs
    }
    found = {name: round(1e3 * statistics.median(values), 2) for name, values in seconds.items()}
    goal = GOALS.get(f"{case} {dtype}")
    met = {} if goal is None else {k: v <= goal for k, v in ratios.items()}
    if (
        case == "machinery" and not bench.whole
    ):  # steps differ by more than the goal from call to call; their parts do not
        shares = bench.machinery_share()
        return {"ratios": ratios, "milliseconds": found, "shares": shares}, met | {
            k: v <= goal - 1 for k, v in shares.items()
        }
    return {"ratios": ratios, "milliseconds": found}, met


def cases_for(arguments: argparse.Namespace, dtype: str, batch: int) -> list[str]:
    """Those that were named; else all, and where the dtype or the number of rows says nothing new, not again."""
    if arguments.cases is not None:
        return [case for case in arguments.cases if case != "gpu"]
    once = () if batch != arguments.batches[0] else ("memory",) if arguments.quick else ("memory", "compiled")
    return ["guided", *(("document",) if f"document {dtype}" in GOALS else ()), "machinery", *once]


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return {
        "processor": names[0] if names else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu_name": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="pictures of 64 codes, one model, one row, no compiled steps"
    )
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, help="for every model, dtype and batch; all where left out"
    )
    parser.add_argument("--models", nargs="+", choices=[shape + end for shape in SHAPES for end in ("", "-cross")])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--codes", type=int, help="per picture: a square number")
    parser.add_argument("--steps", type=int, help="timed in the middle of a picture, at least 6")
    parser.add_argument("--rounds", type=int, help="of which the median counts")
    parser.add_argument("--whole", action="store_true", help="time whole pictures and documents")
    parser.add_argument("--processor-time", action="store_true", help="one thread, and its processor time")
    arguments = parser.parse_args()
    for name, value in (QUICK if arguments.quick else FULL).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if math.isqrt(arguments.codes) ** 2 != arguments.codes or arguments.steps < 6 or arguments.rounds < 1:
        parser.error("--codes must be a square number, --steps at least 6 and --rounds at least 1")
    if arguments.processor_time:
        torch.set_num_threads(1)
    result: dict[str, Any] = {"goals": GOALS, "met": {}}
    for name in arguments.models:
        for dtype in arguments.dtypes:
            made = make(name, getattr(torch, dtype), arguments.codes)
            for batch in arguments.batches:
                for case in cases_for(arguments, dtype, batch):
                    key = f"{name} {dtype} batch {batch}"
                    found, met = measure(Bench(made, batch, arguments), case, dtype, arguments.rounds)
                    result.setdefault(case, {})[key] = found
                    if met:
                        result["met"].setdefault(case, {})[key] = met
                    print(case, key, found, flush=True)
            del made
    if arguments.cases is None or "gpu" in arguments.cases:
        result["gpu"] = "skipped: torch sees no CUDA device"
        if torch.cuda.is_available():
            result["gpu"] = {shape: pictures_on("cuda", shape, arguments) for shape in ("1b", "7b")}
        print("gpu", result["gpu"], flush=True)
    chosen = {name: getattr(arguments, name) for name in ("codes", "steps", "rounds", "whole")}
    chosen |= {"clock": "processor" if arguments.processor_time else "wall", **machine()}
    print(json.dumps({"benchmark": "decoding", **result, **chosen}))


if __name__ == "__main__":
    main()
