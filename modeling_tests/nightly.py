"""A pytest plugin: which cases run every day and which with `--nightly` alone (`make test-all`). It knows no test by
name.

`@pytest.mark.nightly` on a test or a case: only then. `every_day(cases, *chosen)` marks all but the chosen.

`@pytest.mark.sampled(*names)` on a test of many cases: of the parameters named, by default of all, every value is in a
case that runs every day; the other cases are nightly. `pairs=True`: every pair of values of two of them is. The choice
is made among the cases collected, always the same one; a case that is asked for by its whole name runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence

import pytest
from hypothesis import settings


REASON = "nightly: `make test-all` runs it"


def every_day(cases: Sequence[tuple], *chosen: tuple) -> list:
    """The cases for `parametrize`; those that are not among the chosen are nightly."""
    return [case if case in chosen else pytest.param(*case, marks=pytest.mark.nightly) for case in cases]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nightly", action="store_true", help="run the nightly cases, too")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "nightly: runs with --nightly only")
    config.addinivalue_line("markers", "sampled(*names, pairs=False): cases that name every value run every day")
    settings.register_profile("daily", derandomize=True)  # the same examples every day; nightly new ones
    settings.load_profile("default" if config.getoption("--nightly") else "daily")


def covering(cases: Sequence[Sequence[Hashable]], pairs: bool = False) -> set[int]:
    """Places of few cases that have together every value, or every pair of values of two parameters, that any case has.

    cases: the values of each, parameter by parameter.
    """

    def named(case: Sequence[Hashable]) -> set[Hashable]:
        return set(itertools.combinations(enumerate(case), 2 if pairs and len(case) > 1 else 1))

    targets = [named(case) for case in cases]
    left = set().union(*targets)
    chosen = set()
    while left:
        best = max(range(len(cases)), key=lambda place: (len(targets[place] & left), -place))
        chosen.add(best)
        left -= targets[best]
    return chosen


@pytest.hookimpl(tryfirst=True)  # before any item is deselected
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--nightly"):
        return
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("nightly"):
            item.add_marker(pytest.mark.skip(reason=REASON))
        elif item.get_closest_marker("sampled"):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in tests.values():
        marker = cases[0].get_closest_marker("sampled")
        names = marker.args or list(cases[0].callspec.params)
        values = [[repr(item.callspec.params[name]) for name in names] for item in cases]
        chosen = covering(values, **marker.kwargs)
        for place, item in enumerate(cases):
            if place not in chosen:
                item.add_marker(pytest.mark.skip(reason=REASON))
