"""A pytest plugin: which feature works in which fusion mode, read off the results of the tests that say what they show.

A test names its feature with `@pytest.mark.feature(section, name)`. Its mode is its parameter `mode`; a test without
one speaks for all modes, or for those that the marker's `modes=` lists. `pytest --feature-report FILE.json` writes what
was found; modeling_tests/compatibility.py makes docs/compatibility.md of it. It knows test results only.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest


MODES = ("uniform", "width", "cross")
FEATURES = pytest.StashKey[dict[tuple[str, str], set[str]]]()
FILES = pytest.StashKey[set[Path]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--feature-report", metavar="FILE", help="write the results of the tests marked `feature` as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "feature(section, name, modes=MODES): the feature that this test shows to work")
    if config.getoption("--feature-report") and not hasattr(config, "workerinput"):  # under xdist, the controller's job
        config.pluginmanager.register(FeatureReport(Path(config.getoption("--feature-report"))))


def feature_of(item: pytest.Item) -> dict[str, Any] | None:
    """`{"section", "name", "modes"}` of a marked test, None of another."""
    marker = item.get_closest_marker("feature")
    if marker is None:
        return None
    section, name = marker.args
    mode = getattr(item, "callspec", None) and item.callspec.params.get("mode")
    modes = [mode] if mode is not None else list(marker.kwargs.get("modes", MODES))
    if not set(modes) <= set(MODES):
        raise pytest.UsageError(f"{item.nodeid}: the modes of a feature are among {MODES}, got {modes}.")
    return {"section": section, "name": name, "modes": modes}


@pytest.hookimpl(tryfirst=True)  # before any item is deselected
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    collected: dict[tuple[str, str], set[str]] = {}
    for item in items:
        feature = feature_of(item)
        if feature is not None:
            item.user_properties.append(("feature", feature))
            collected.setdefault((feature["section"], feature["name"]), set()).update(feature["modes"])
    config.stash[FEATURES] = collected
    config.stash[FILES] = {item.path for item in items}


class FeatureReport:
    def __init__(self, path: Path):
        self.path = path
        self.results: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        feature = dict(report.user_properties).get("feature")
        if feature is None or not (report.when == "call" or report.outcome != "passed"):
            return
        reason = (
            report.longrepr[2].removeprefix("Skipped: ")
            if report.skipped and isinstance(report.longrepr, tuple)
            else ""
        )
        self.results.append({**feature, "test": report.nodeid, "outcome": report.outcome, "reason": reason})

    def pytest_sessionfinish(self) -> None:
        aside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(self.results, indent=1) + "\n")
        aside.replace(self.path)
