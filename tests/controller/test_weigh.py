"""Why a group is computed in every step: what the policy would do with another value in one place."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cacompile.config import Config
from cacompile.controller import weigh as reasons
from cacompile.controller.policy import FAST
from cacompile.controller.weigh import Weighed, weigh, why_dense
from cacompile.state.groups import Numbering

GROUPS = 8


def weighed(**values: Any) -> Weighed:
    """Eight groups that hardly move; the first and the last two win little. values: others of all, or (value,) of
    the first."""
    columns = {"descent": 1e-3, "ratio": FAST / 100, "flops": 1e6, "usual": 1e-3, "turns": 4}
    step_flops = values.pop("step_flops", None)
    made = {name: np.full(GROUPS, value) for name, value in columns.items()}
    for name in ("descent", "usual"):
        made[name][[0, -2, -1]] *= 0.1
    for name, value in values.items():
        made[name][0 : len(value) if isinstance(value, tuple) else GROUPS] = value
    return Weighed(**made, step_flops=step_flops)


@pytest.mark.parametrize(
    ("values", "options", "first", "last"),
    [
        ({}, {}, "", ""),
        ({"ratio": FAST}, {}, reasons.FAST, reasons.FAST),
        ({"descent": (1.0,), "usual": (1.0,)}, {}, reasons.DEAR, ""),
        ({"flops": (0.0,)}, {}, reasons.SMALL, ""),
        ({"descent": (np.nan,)}, {}, reasons.UNREAD, ""),
        ({"turns": (1,)}, {}, reasons.ALONE, ""),
        ({"step_flops": 1e9}, {}, reasons.SMALL_PART, reasons.SMALL_PART),
        ({"step_flops": 1e9, "ratio": FAST}, {}, reasons.SMALL_PART, reasons.SMALL_PART),
        ({"descent": 0.0}, {}, reasons.NOTHING_WON, reasons.NOTHING_WON),
        ({"usual": (1e-7, *[1e-6] * 5, 1e-7, 1e-7)}, {}, reasons.JUMPED, reasons.JUMPED),
        ({}, {"tolerance": 1e-9}, reasons.NO_ROOM, reasons.NO_ROOM),
        (
            {"flops": (1e5, *[1e6] * 5, 1e5, 1e5), "descent": (1e-5, *[1e-3] * 5, 1e-5, 1e-5), "ratio": FAST / 9},
            {},
            reasons.LITTLE,
            reasons.LITTLE,
        ),
        ({"ratio": FAST / 9}, {"tolerance": 0.5}, "", ""),
        ({}, {"budget": 1e-6}, reasons.ENOUGH, reasons.ENOUGH),
        ({"descent": (1.0,), "usual": (1.0,), "ratio": FAST}, {"budget": 0.1}, reasons.DEAR, ""),
    ],
)
def test_what_holds_a_group_on(values: dict[str, Any], options: dict[str, float], first: str, last: str):
    found = weighed(**values)
    config = Config(**options)
    assert why_dense(found, config)[0] == first and why_dense(found, config)[-1] == last
    keep = found.keep(config)
    assert (keep[0] < reasons.SELDOM, keep[-1] < reasons.SELDOM) == (not first, not last)


def test_groups_are_weighed_by_their_blocks():
    index = SimpleNamespace(of_block=np.array([0, 0, 1, 2]), turns=np.array([3, 3, 3]), sum=None)
    index.sum = Numbering(index.of_block, np.zeros(3, int)).sum
    descent = np.array([1.0, np.nan, 2.0, 3.0])
    fixed = np.array([False, False, False, True])
    found = weigh(
        index, descent, np.array([0.1, 0.5, 0.2, 0.3]), np.full(4, 10.0), np.array([1.0, np.nan, 2, 3]), fixed
    )
    assert found.descent.tolist() == [1.0, 2.0, 0.0] and found.flops.tolist() == [20.0, 10.0, 0.0]
    assert found.ratio[:2].tolist() == [0.1, 0.2] and found.usual.tolist() == [1.0, 2.0, 3.0]
