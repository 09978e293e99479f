"""docs/fusion.md: its table has the pairs, modes and refusals that the engine has today."""

from collections import Counter

import pytest
from fusion_table import NAMES, PAGE, keys_on_the_page, refusals, rows


@pytest.fixture(scope="module")
def page():
    return PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def every():
    return list(rows())


def test_every_pair_in_every_mode_is_a_row_or_is_refused(page, every):
    expected = Counter((NAMES[kind], NAMES[name], mode, init) for kind, name, mode, init, _ in every)
    assert Counter(keys_on_the_page(page)) == expected, "run `python modeling_tests/fusion_table.py`"


def test_what_is_refused_is_refused_for_the_reason_on_the_page(page, every):
    lines = set(page.splitlines())
    assert not [line for line in refusals([row for row in every if row[-1]]) if line not in lines]
    for kind, name, mode, init, reason in every:
        measured = any(line.startswith(f"| {NAMES[kind]} | {NAMES[name]} | {mode} {init} | ") for line in lines)
        refused = f"| {NAMES[kind]} | {NAMES[name]} | {mode} {init} | they" in page
        assert (measured and not refused) == (reason is None)


def test_the_preserving_form_preserves_in_every_row(page):
    preserving = [line.split(" | ") for line in page.splitlines() if " | cross preserving | " in line]
    assert len(preserving) == len({tuple(cells[:2]) for cells in preserving}) > 40
    for cells in preserving:
        assert cells[3] == "bit for bit"
        assert cells[4] == "bit for bit" or (cells[1] == "Janus" and "bound" in cells[4])
