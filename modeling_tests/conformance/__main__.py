"""Run transformers' own test-suite on JAMs and print what passed, failed and was skipped, next to a stock Llama.

    python modeling_tests/conformance [-n 3] [--nightly] [-k EXPRESSION] [--results runs/conformance.jsonl]

Fetches the tests of the installed version from the package index, once. Three workers share them. Without --nightly
the tests that train or start processes run on three of the JAMs. Ends with an error where a test failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path


HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def run_suites(tests: Path, results: Path, options: list[str]) -> None:
    """Write one line to `results` for each test; an error of pytest itself is raised."""
    environment = {
        **os.environ,
        "TRANSFORMERS_TESTS": str(tests),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, HERE / "stand_ins", HERE, HERE.parent))),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    pytest = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(HERE), "--noconftest"]
    pytest += ["-p", "no:cacheprovider", "-p", "harness", "-p", "heap", "-p", "results", "--results", str(results)]
    pytest += ["-o", "python_files=suite_*.py", "-o", "verbosity_subtests=0"]
    pytest += ["-q", "--tb=short", "-W", "ignore", str(HERE), *options]
    code = subprocess.run(pytest, env=environment, cwd=ROOT).returncode
    if code not in (0, 1, 5):  # passed, some failed, none selected
        raise SystemExit(f"pytest could not run the suites (exit code {code}); its output above says why.")


def main() -> None:
    sys.path[:0] = [str(HERE)]
    from results import table
    from source import fetch_tests

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cache", type=Path, default=ROOT / "runs" / "transformers-tests", help="where the tests are kept"
    )
    parser.add_argument(
        "--results", type=Path, default=ROOT / "runs" / "conformance.jsonl", help="one line for each test"
    )
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="only tests whose names match, as in pytest")
    parser.add_argument(
        "-n", type=int, default=3, metavar="WORKERS", help="processes that share the tests (default: 3)"
    )
    parser.add_argument("--nightly", action="store_true", help="on all JAMs what otherwise runs on three")
    arguments = parser.parse_args()

    tests = fetch_tests(arguments.cache.resolve())
    results = arguments.results.resolve()
    results.parent.mkdir(parents=True, exist_ok=True)
    aside = results.with_name(f".{results.name}.{os.getpid()}")
    try:
        options = ["-n", str(arguments.n), *(["--nightly"] if arguments.nightly else [])]
        run_suites(tests, aside, [*options, *(["-k", arguments.k] if arguments.k else [])])
        if not aside.exists() or not aside.stat().st_size:
            raise SystemExit(f"No test matches -k {arguments.k!r}.")
        os.replace(aside, results)
    finally:
        aside.unlink(missing_ok=True)
    found = [json.loads(line) for line in results.read_text().splitlines()]
    print(table(found))
    failed = sum(test["outcome"] == "failed" for test in found)
    print(f"\n{len(found)} tests, {failed} failed; written to {arguments.results}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
