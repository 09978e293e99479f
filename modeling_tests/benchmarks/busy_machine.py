"""What settings of threads cost on a quiet machine and beside one busy process: a training step, and short documents.

    python modeling_tests/benchmarks/busy_machine.py            # under 6 minutes on 2 quiet cores; nothing else may run

Two works, with the quickstart's jam-cross and random weights: a training step of packed rows, and `generate` of 20 rows
of 30 ids. Each setting is a process of its own, since OpenMP reads it when it is loaded: torch's defaults, threads that
wait passively, one thread, and what the command line sets by itself (jam_hf_cli/threads.py) for the work. Each is timed
quiet and then beside a process that computes all the time. Goals: ours at most 1.1 of the best quiet figure, and 2.5 of
the best busy one. `--spins` times further bounds of spinning. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager


WORKS = ("train", "generate")
ROUNDS = {"train": 7, "generate": 5}


@contextmanager
def busy(processes: int):
    """So many processes that compute meanwhile."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def work_of(name: str) -> Callable[[], None]:
    import torch
    from training_step import _batch, _model

    from jam_hf.training.muon import MuonAdamW, muon_parameter_groups
    from jam_hf.training.recipes import RecipeSettings, fast_arithmetic, freeze

    model = _model()
    if name == "generate":
        model.eval()
        ids = torch.randint(17, 700, (20, 8), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        settings = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False, "generation_mode": "interleaved"}
        return lambda: model.generate(input_ids=ids, attention_mask=mask, **settings)
    freeze(model, "vq")
    optimizer = MuonAdamW(muon_parameter_groups(model, 1e-3, 1e-3, 0.01), lr=1e-3)
    batch = _batch(rows=8, documents=2, length=70)

    def step() -> None:
        with fast_arithmetic(model, RecipeSettings(attn_implementation="eager", float32_matmul_precision="medium")):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


def seconds(work: Callable[[], None], rounds: int, of: Callable[[list[float]], float]) -> float:
    took = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    return of(took)


def measure(name: str, setting: str) -> dict[str, float]:
    """In a process of its own: seconds of the work, quiet and beside a busy process."""
    if setting == "ours":
        from jam_hf_cli.threads import settle

        settle(small=name == "generate")
    work = work_of(name)
    for _ in range(2):
        work()
    found = {"quiet": seconds(work, ROUNDS[name], min)}  # whatever else there was, not in all rounds
    with busy(1):
        time.sleep(0.5)
        work()
        found["busy"] = seconds(work, ROUNDS[name], statistics.median)
    return {kind: round(value, 4) for kind, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spins", type=int, nargs="*", default=[], help="further bounds of spinning to time")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(*arguments.child)))
        return
    settings: dict[str, dict[str, str]] = {"ours": {}, "default": {}, "passive": {"OMP_WAIT_POLICY": "passive"}}
    settings["one thread"] = {"OMP_NUM_THREADS": "1"}
    settings |= {f"spin {count}": {"GOMP_SPINCOUNT": str(count)} for count in arguments.spins}
    own = {"OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}
    clean = {name: value for name, value in os.environ.items() if name not in own}
    result: dict[str, object] = {"benchmark": "busy_machine", "processors": len(os.sched_getaffinity(0))}
    for name in WORKS:
        found = {}
        for setting, variables in settings.items():
            command = [sys.executable, __file__, "--child", name, setting]
            done = subprocess.run(command, env={**clean, **variables}, stdout=subprocess.PIPE, text=True, check=True)
            found[setting] = json.loads(done.stdout.splitlines()[-1])
            print(f"{name:9} {setting:12} {found[setting]}", flush=True)
        best = {kind: min(times[kind] for times in found.values()) for kind in ("quiet", "busy")}
        ratios = {kind: round(found["ours"][kind] / best[kind], 2) for kind in best}
        result[name] = {**found, "ours to the best": ratios, "met": ratios["quiet"] <= 1.1 and ratios["busy"] <= 2.5}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
