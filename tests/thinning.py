"""Which cases of a test with many parameters are quick."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import pytest


def thin_out(items: Iterable[Any]) -> None:
    """Of the product of a test's parameters one case in n stays quick, by the sum of the places of its values.

    Each two values meet in one of them where a third parameter has n values or more.
    """
    values: dict[Any, list[Any]] = defaultdict(list)
    for item in items:
        if (thin := item.get_closest_marker("thin")) is None:
            continue
        place = 0
        for name, value in item.callspec.params.items():
            known = values[item.function, name]
            known += [] if any(value is each for each in known) else [value]
            place += next(i for i, each in enumerate(known) if value is each)
        if place % thin.args[0]:
            item.add_marker(pytest.mark.slow)
