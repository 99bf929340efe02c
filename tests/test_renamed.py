"""Public names that have changed work for one more version, and say what they are called now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import cacompile
from cacompile import passes
from cacompile.passes.plan import Plan, StaysDense


def found() -> Any:
    return cacompile.explain(nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8))


MODEL = nn.Linear(8, 8)


def session() -> Any:
    return cacompile.session(MODEL)


RENAMED: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "Session.instances": (lambda: session().instances, list, "Session.bindings"),
    "Session.tracked": (lambda: list(session().tracked), lambda: ["weight", "bias"], "Session.params"),
    "Session.units": (lambda: session().units.all, list, "Session.index"),
    "Plan.skips": (
        lambda: Plan(dense=(StaysDense("w", "other", "why"),)).skips,
        lambda: (StaysDense("w", "other", "why"),),
        "Plan.dense",
    ),
    "Plan.cuts": (lambda: Plan(untraced=(("x", 1),)).cuts, lambda: (("x", 1),), "Plan.untraced"),
    "Plan.guarded": (lambda: Plan(masked=("w",)).guarded, lambda: ("w",), "Plan.masked"),
    "passes.guard_weight_grads": (
        lambda: passes.guard_weight_grads,
        lambda: passes.mask_weight_grads,
        "passes.mask_weight_grads",
    ),
    "Explanation.cuts": (lambda: found().cuts, dict, "Explanation.untraced"),
    "version 'guarded'": (lambda: found().code("guarded"), lambda: found().code("masked"), "'masked'"),
}


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_works_and_warns(old: str) -> None:
    by_old, by_new, new = RENAMED[old]
    with pytest.warns(DeprecationWarning, match="goes with the next version") as warned:
        value = by_old()
    assert value == by_new()
    assert any(old.split(".")[-1] in str(each.message) and new in str(each.message) for each in warned)
    assert any(each.filename == __file__ for each in warned), "it points at who has used it"


@pytest.mark.parametrize("holder", [session(), Plan(), passes], ids=["Session", "Plan", "passes"])
def test_other_names_are_not_there(holder: Any) -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        holder.no_such_name  # noqa: B018
