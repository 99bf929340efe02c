"""Handles of one binding: a number for each way in which a graph runs with it, which its backward sees."""

from __future__ import annotations

import itertools
from typing import NamedTuple

HANDLES = 1000
"""Ways that are remembered: schedules may draw another set of frozen parameters in each step."""

_numbers = itertools.count(1)


class Call(NamedTuple):
    """What one run of a graph leaves out."""

    dead: frozenset[int] = frozenset()
    """Positions of inputs that are to get no gradient."""
    cut: frozenset[int] | None = None
    """The places of gradients for which its forward saves nothing; None: it saves all."""
    detached: bool = False
    """Whether frozen parameters that have hooks were detached, so that nothing is called."""


EVERYTHING = Call()
"""Nothing is left out."""


class Handles:
    """What is frozen when a forward runs decides for its backward, whatever is thawed meanwhile."""

    def __init__(self) -> None:
        self.own = next(_numbers)
        """Of a call that leaves nothing out."""
        self._calls: dict[Call, int] = {}
        self._call_of: dict[int, Call] = {}

    def of(self, call: Call) -> int:
        """The handle that says what a call leaves out."""
        if call == EVERYTHING:
            return self.own
        if call not in self._calls:
            while len(self._calls) >= HANDLES:
                self._call_of.pop(self._calls.pop(next(iter(self._calls))))
            self._calls[call] = handle = next(_numbers)
            self._call_of[handle] = call
        return self._calls[call]

    def call_of(self, handle: int) -> Call:
        """What `of` was given; nothing of a forward since which `HANDLES` others have left out other things."""
        return self._call_of.get(handle, EVERYTHING)
