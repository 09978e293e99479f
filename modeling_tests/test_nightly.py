"""The cases that run every day name what all cases name."""

import itertools

import pytest
from nightly import covering


FACTORS = {"two": ("abc", "vwxyz"), "three": ("abc", "vwxyz", "12"), "one": ("abcdef",)}


@pytest.mark.parametrize("factors", FACTORS)
def test_every_value_is_named(factors):
    cases = list(itertools.product(*FACTORS[factors]))
    chosen = [cases[place] for place in covering(cases)]
    assert [set(values) for values in zip(*chosen)] == [set(values) for values in FACTORS[factors]]
    assert len(chosen) == max(map(len, FACTORS[factors]))


def test_every_pair_is_named():
    cases = list(itertools.product("abc", "vwxyz", "12", "12"))
    chosen = [cases[place] for place in covering(cases, pairs=True)]
    for i, j in itertools.combinations(range(4), 2):
        assert {(case[i], case[j]) for case in chosen} == {(case[i], case[j]) for case in cases}
    assert 15 <= len(chosen) <= 20


def test_what_only_an_odd_case_has_is_named():
    assert covering([("a", 1), ("a", 2), ("b", 1)], pairs=True) == {0, 1, 2}
    assert covering([]) == set()


def test_cases_marked_are_skipped_unless_asked_for(pytester):
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.sampled
        @pytest.mark.parametrize("text", ["a", "b", "c"])
        @pytest.mark.parametrize("image", ["x", "y"])
        def test_pairs(text, image): pass

        @pytest.mark.sampled("mode")
        @pytest.mark.parametrize(("family", "mode"), [("llama", "cross"), ("opt", "cross"), ("opt", "width")])
        def test_modes(family, mode): pass

        @pytest.mark.nightly
        def test_long(): pass
        """
    )
    daily = ["-p", "nightly", "-p", "no:randomly", "-p", "no:cacheprovider"]
    pytester.runpytest(*daily).assert_outcomes(passed=3 + 2, skipped=3 + 1 + 1)
    pytester.runpytest(*daily, "test_cases_marked_are_skipped_unless_asked_for.py::test_pairs[x-b]").assert_outcomes(
        passed=1
    )
    pytester.runpytest(*daily, "--nightly").assert_outcomes(passed=10)
