"""docs/compatibility.md: made from results, and of the features that the tests have today."""

import sys
from pathlib import Path

import pytest
from compatibility_table import cell, feature_table
from feature_report import FEATURES, FILES


TESTS = Path(__file__).resolve().parent.parent
PAGE = TESTS.parent / "docs" / "compatibility.md"


def features_on_the_page() -> set[tuple[str, str]]:
    found, section = set(), ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("| ") and not line.startswith("| feature |") and "transformers' own" not in section:
            found.add((section, line.split("|")[1].strip()))
    return found


def test_the_page_has_the_features_that_the_tests_have(request):
    ours = {path for path in TESTS.rglob("test_*.py") if "conformance" not in path.parts}
    if ours - request.config.stash[FILES]:
        pytest.skip("only where the whole test-suite is collected")
    assert features_on_the_page() == set(request.config.stash[FEATURES]), "run `make compatibility`"


def result(outcome, reason="", modes=("cross",), name="beams"):
    return {"section": "Decoding", "name": name, "modes": list(modes), "outcome": outcome, "reason": reason}


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ([], "-"),
        ([result("passed"), result("passed")], "yes"),
        ([result("passed"), result("failed")], "**NO**"),
        ([result("passed"), result("skipped", "no GPU")], "partly [1]"),
        ([result("skipped", "no GPU"), result("skipped", "no GPU")], "skipped [1]"),
    ],
)
def test_a_cell_says_no_more_than_the_results(results, expected):
    assert cell(results, {}) == expected


def test_reasons_are_numbered_once():
    table = feature_table(
        [result("skipped", "no GPU"), result("skipped", "no GPU", name="static cache"), result("passed")]
    )
    assert table.count("[1]") == 3 and "[2]" not in table
    assert "| beams | - | - | partly [1] |" in table


@pytest.fixture
def results_module(monkeypatch):
    monkeypatch.syspath_prepend(str(TESTS / "conformance"))
    sys.modules.pop("results", None)
    import results

    yield results
    sys.modules.pop("results", None)


def test_the_suites_table_counts_failures_and_groups_reasons(results_module):
    tests = [
        {"suite": "StockLlama", "test": "test_a", "outcome": "passed", "reason": ""},
        {"suite": "StockLlama", "test": "test_b", "outcome": "skipped", "reason": "no GPU"},
        {"suite": "CrossLlama", "test": "test_a", "outcome": "failed", "reason": ""},
        {"suite": "CrossLlama", "test": "test_b", "outcome": "skipped", "reason": "no GPU"},
    ]
    table = results_module.table(tests)
    assert "| CrossLlama | 0 | 1 | 1 |" in table
    assert "- CrossLlama: test_a" in table
    assert "| 1, stock Llama's too | no GPU |" in table
