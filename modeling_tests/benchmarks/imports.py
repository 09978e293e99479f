"""CPU seconds of `import jam_hf` against transformers' own imports, and of `jam-hf --help`.

    python modeling_tests/benchmarks/imports.py            # about 4 minutes

Peer, in the same run and in turn: `from transformers import LlamaForCausalLM, AutoProcessor`. A process each, user and
system time, medians. Goals: 1.2 of the peer, and 0.5 seconds. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys


COMMANDS = {
    "transformers": ["-c", "from transformers import LlamaForCausalLM, AutoProcessor"],
    "jam_hf": ["-c", "import jam_hf"],
    "help": ["-m", "jam_hf_cli", "--help"],
}


def cpu_seconds(command: list[str]) -> float:
    before = os.times()
    subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="of which the median counts (default: 9)")
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds + 1):  # the first one warms the disk up
        for name, command in COMMANDS.items():
            seconds[name].append(cpu_seconds(command))
    result: dict[str, object] = {f"{name}_seconds": round(statistics.median(s[1:]), 3) for name, s in seconds.items()}
    ratio = statistics.median(seconds["jam_hf"][1:]) / statistics.median(seconds["transformers"][1:])
    met = {"import": ratio <= 1.2, "help": statistics.median(seconds["help"][1:]) <= 0.5}
    print(json.dumps({"benchmark": "imports", **result, "ratio": round(ratio, 3), "rounds": rounds, "met": met}))


if __name__ == "__main__":
    main()
