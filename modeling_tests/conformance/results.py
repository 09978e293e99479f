"""A pytest plugin: the results of transformers' own tests by suite, and the table that is made of them.

It knows names, outcomes and reasons only.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", metavar="FILE", help="write one line of JSON for each test")


def pytest_configure(config: pytest.Config) -> None:
    for name in (
        "slow generate is_training_test is_tensor_parallel_test is_fsdp_test torch_compile_test torch_export_test "
        "flash_attn_test flash_attn_3_test flash_attn_4_test flash_attn_mps_test all_flash_attn_test order"
    ).split():
        config.addinivalue_line("markers", f"{name}: of transformers")
    if config.getoption("--results") and not hasattr(config, "workerinput"):  # under xdist, the controller's job
        config.pluginmanager.register(Results(Path(config.getoption("--results"))))


class Results:
    def __init__(self, path: Path):
        self.path = path
        self.tests: dict[str, dict[str, Any]] = {}
        self.order: dict[str, int] = {}

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.order = {test: place for place, test in enumerate(ids)}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        suite, _, name = report.nodeid.partition("::")[2].partition("::")
        test = self.tests.setdefault(report.nodeid, {"suite": suite, "test": name, "outcome": "passed", "reason": ""})
        if report.failed:  # of one subtest as well
            test["outcome"] = "failed"
        elif report.skipped and test["outcome"] != "failed" and "SubtestReport" not in type(report).__name__:
            test["outcome"] = "skipped"
            if isinstance(report.longrepr, tuple):
                test["reason"] = " ".join(report.longrepr[2].removeprefix("Skipped: ").split())

    def pytest_sessionfinish(self) -> None:
        names = sorted(self.tests, key=lambda test: self.order.get(test, 0))  # workers report as they finish
        self.path.write_text("".join(json.dumps(self.tests[name]) + "\n" for name in names))


def table(tests: list[dict[str, Any]]) -> str:
    """Markdown: passed, failed and skipped of each suite, what failed, and each reason to skip with the suites it
    holds for.
    """
    suites = list(dict.fromkeys(test["suite"] for test in tests))
    counts = {suite: Counter(test["outcome"] for test in tests if test["suite"] == suite) for suite in suites}
    lines = ["| suite | passed | failed | skipped |", "|---|---|---|---|"]
    for suite in suites:
        lines.append(
            f"| {suite} | {counts[suite]['passed']} | {counts[suite]['failed']} | {counts[suite]['skipped']} |"
        )
    if failed := [f"- {test['suite']}: {test['test']}" for test in tests if test["outcome"] == "failed"]:
        lines += ["", "Failed:", "", *failed]
    reasons: dict[str, Counter] = defaultdict(Counter)
    for test in tests:
        if test["outcome"] == "skipped":
            reasons[test["reason"]][test["suite"]] += 1
    lines += ["", "| tests skipped, in each suite | because |", "|---|---|"]
    for reason, by_suite in sorted(reasons.items(), key=lambda item: -sum(item[1].values())):
        models = [suite for suite in suites if suite not in ("Processor", "ImageProcessor", "Tokenizer")]
        if [by_suite[suite] for suite in models] == [by_suite[models[0]]] * len(models) and set(by_suite) == set(
            models
        ):
            where = f"{by_suite[models[0]]}, stock Llama's too"
        else:
            where = ", ".join(f"{suite} {count}" for suite, count in by_suite.items())
        lines.append(f"| {where} | {reason.replace('|', '/')} |")
    return "\n".join(lines)
