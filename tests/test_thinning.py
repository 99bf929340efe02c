"""Of a thinned product each two values still meet, and what is left out is slow, not gone."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from thinning import thin_out


class Case:
    """As pytest collects it, of one test function."""

    def __init__(self, function: object, mark: Any, **params: Any) -> None:
        self.function, self.callspec, self.marks = function, SimpleNamespace(params=params), {"thin": mark}
        self.get_closest_marker = self.marks.get

    def add_marker(self, mark: Any) -> None:
        self.marks[mark.name] = mark


SIDES = {"dtype": ("a", "b", "c", "d"), "dim": (0, 1, (0, 1)), "block": (1, 16, 128), "pattern": ("on", "off", "one")}


def cases(mark: Any) -> list[Case]:
    one = object()
    return [Case(one, mark, **dict(zip(SIDES, values))) for values in itertools.product(*SIDES.values())]


def test_each_two_values_meet_in_a_third_of_the_cases() -> None:
    found = cases(pytest.mark.thin(3).mark)
    thin_out(found)
    quick = [case.callspec.params for case in found if "slow" not in case.marks]
    assert len(quick) == len(found) // 3
    for one, other in itertools.combinations(SIDES, 2):
        met = {(params[one], params[other]) for params in quick}
        assert met == set(itertools.product(SIDES[one], SIDES[other]))


def test_what_is_not_to_be_thinned_stays() -> None:
    found = cases(None)
    thin_out(found)
    assert not any("slow" in case.marks for case in found)
