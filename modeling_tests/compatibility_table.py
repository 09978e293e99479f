"""Write docs/compatibility.md: which feature works in which fusion mode, from the results of the tests that show it.

    python modeling_tests/compatibility_table.py --features runs/features.json --conformance runs/conformance.jsonl

`make compatibility` runs both and then this. It knows results only, no feature by name.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any


HERE = Path(__file__).resolve().parent
MODES = ("uniform", "width", "cross")

INTRODUCTION = """# What works, in each fusion mode

Written by `make compatibility` from test results; do not edit. **yes**: every test of the feature passed. **partly**:
some passed, the others were skipped for the reason below. **skipped**: all were. **NO**: a test failed. **-**: not a
feature of the mode.
"""


def cell(results: list[dict[str, Any]], footnotes: dict[str, int]) -> str:
    """One feature in one mode; `footnotes` gathers the reasons for skipping, numbered as they come."""
    if not results:
        return "-"
    outcomes = {result["outcome"] for result in results}
    if "failed" in outcomes:
        return "**NO**"
    reasons = dict.fromkeys(result["reason"] for result in results if result["outcome"] == "skipped")
    marks = ", ".join(f"[{footnotes.setdefault(reason, len(footnotes) + 1)}]" for reason in reasons)
    if outcomes == {"passed"}:
        return "yes"
    return f"partly {marks}" if "passed" in outcomes else f"skipped {marks}"


def feature_table(results: list[dict[str, Any]]) -> str:
    """Markdown, one table for each section, in alphabetical order, and the reasons for skipping."""
    sections: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        sections[result["section"]][result["name"]].append(result)
    footnotes: dict[str, int] = {}
    lines: list[str] = []
    for section in sorted(sections):
        lines += [f"## {section}", "", f"| feature | {' | '.join(MODES)} |", "|---|---|---|---|"]
        for name in sorted(sections[section], key=str.lower):
            found = sections[section][name]
            cells = [cell([result for result in found if mode in result["modes"]], footnotes) for mode in MODES]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    if footnotes:
        lines += ["Skipped because:", "", *(f"[{number}] {reason}  " for reason, number in footnotes.items()), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=Path, required=True, help="written by pytest --feature-report")
    parser.add_argument("--conformance", type=Path, required=True, help="written by modeling_tests/conformance")
    parser.add_argument("--output", type=Path, default=HERE.parent / "docs" / "compatibility.md")
    arguments = parser.parse_args()
    sys.path.insert(0, str(HERE / "conformance"))
    from results import table

    features = json.loads(arguments.features.read_text())
    conformance = [json.loads(line) for line in arguments.conformance.read_text().splitlines()]
    heading = "## transformers' own test-suite (`make conformance`)"
    page = [INTRODUCTION, feature_table(features), heading, "", table(conformance)]
    aside = arguments.output.with_name(f".{arguments.output.name}.{os.getpid()}")
    aside.write_text("\n".join(page) + "\n")
    aside.replace(arguments.output)
    print(f"{len(features)} results of features and {len(conformance)} of the suite: {arguments.output}")


if __name__ == "__main__":
    main()
