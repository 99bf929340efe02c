"""A saved state is taken over whole or not at all; `test_session` loads the good ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import cacompile
from cacompile.config import Config
from cacompile.errors import ConvAwareError
from cacompile.layout import Partition
from cacompile.sessions.session import Session
from cacompile.state.registry import registry


@pytest.fixture
def session() -> Iterator[Session]:
    """4 groups of "0.weight", 2 of "1.weight", as after a forward pass; a mask is pinned."""
    model = nn.Sequential(nn.Linear(16, 64, bias=False), nn.Linear(64, 32, bias=False))
    for name, param in model.named_parameters():
        assert registry.track(param, name).part(Partition(0, 16, len(param)), Config(), name)
    session = cacompile.session(model)
    session.pin([True, False, True, True, False, True])
    yield session


def array(name: str, value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda entry: {**entry, "blocks": {**entry["blocks"], name: value}}


ENTRIES: dict[str, tuple[Callable[[dict[str, Any]], Any], list[str]]] = {
    "no mapping": (lambda e: [1, 2], ["mapping", "list"]),
    "shape": (lambda e: {**e, "shape": 64}, ["shape", "64"]),
    "key": (lambda e: {**e, "key": "0"}, ["key", "'0'", "int"]),
    "step": (lambda e: {**e, "step": -1}, ["step", "-1", ">= 0"]),
    "step is beyond int64": (lambda e: {**e, "step": 10**25}, ["step", str(10**25), f"<= {2**62}"]),
    "step is beyond printing": (lambda e: {**e, "step": 10**5000}, ["step", "of type int"]),
    "step is a tensor": (lambda e: {**e, "step": torch.ones(2)}, ["step", "float32 [2]"]),
    "key is beyond int64": (lambda e: {**e, "key": 2**70}, ["key", str(2**70)]),
    "another key": (lambda e: {**e, "more": 1}, ["unknown key", "'more'", "in_flight"]),
    "another array": (array("more", torch.ones(2)), ["blocks", "'more'", "update_ratio"]),
    "age is negative": (array("age", torch.tensor([0, -5])), ["blocks['age']", "-5", "from 0"]),
    "age is endless": (array("age", torch.tensor([0, 2**63 - 1])), ["blocks['age']", str(2**63 - 1), str(2**62)]),
    "keep is NaN": (array("keep", torch.tensor([0.5, math.nan]).double()), ["blocks['keep']", "nan"]),
    "phase": (array("phase", torch.tensor([0.5, -0.5]).double()), ["blocks['phase']", "-0.5", "or -1"]),
    "score": (array("score", torch.tensor([0.5, math.inf]).double()), ["blocks['score']", "inf", "finite"]),
    "update ratio": (array("update_ratio", torch.tensor([0.5, -1.0]).double()), ["blocks['update_ratio']", ">= 0"]),
    "array is on no host": (array("age", torch.zeros(2, dtype=torch.int64, device="meta")), ["blocks['age']", "meta"]),
    "pin's keep is NaN": (lambda e: {**e, "pin": (None, math.nan, 0)}, ["pin's keep", "nan"]),
    "pin's mask is of numbers": (lambda e: {**e, "pin": ((1, 0), 1.0, 0)}, ["pin's mask", "2 bools", "(1, 0)"]),
    "pin's seed is too large": (lambda e: {**e, "pin": (None, 0.5, 2**64)}, ["pin's seed", str(2**64)]),
    "norm shares of no order": (
        lambda e: {**e, "norm_shares": {"order": math.nan, "values": torch.ones(2), "known": torch.ones(2).bool()}},
        ["norm_shares['order']", "> 0", "nan"],
    ),
    "norm shares are negative": (
        lambda e: {**e, "norm_shares": {"order": 2.0, "values": -torch.ones(2), "known": torch.ones(2).bool()}},
        ["norm_shares['values']", ">= 0", "-1.0"],
    ),
    "in_flight values of half a dtype": (
        lambda e: {**e, "in_flight": {"values": torch.ones(2, 2).half(), "sampled": None}},
        ["in_flight['values']", "floats [2, 2]", "float16"],
    ),
    "counted leaves no room": (
        lambda e: {**e, "counted": torch.tensor([0, 2**63 - 1])},
        ["counted", f"<= {2**62}"],
    ),
    "step_counted": (lambda e: {**e, "step_counted": -1}, ["step_counted", "-1", "whole number >= 0"]),
    "step is a bool": (lambda e: {**e, "step": True}, ["step", "True"]),
    "partition": (lambda e: {**e, "partition": (0, 16)}, ["partition", "(0, 16)", "(dim, block, rows)"]),
    "partition of another shape": (lambda e: {**e, "partition": (0, 16, 64)}, ["partition", "(0, 16, 64)", "(32, 64)"]),
    "block of no rows": (lambda e: {**e, "partition": (0, 0, 32)}, ["partition", "block >= 1"]),
    "skipped": (lambda e: {**e, "skipped": torch.zeros(3, dtype=torch.bool)}, ["skipped", "bool [2]", "bool [3]"]),
    "blocks are no mapping": (lambda e: {**e, "blocks": None}, ["blocks", "mapping", "NoneType"]),
    "blocks lack an array": (
        lambda e: {**e, "blocks": {k: v for k, v in e["blocks"].items() if k != "age"}},
        ["blocks", "lacks age"],
    ),
    "array is too long": (
        array("update_ratio", torch.ones(3).double()),
        ["blocks['update_ratio']", "float64 [2]", "float64 [3]"],
    ),
    "array of another type": (array("on", torch.ones(2)), ["blocks['on']", "bool [2]", "float32 [2]"]),
    "array is no tensor": (array("score", [0.0, 0.0]), ["blocks['score']", "float64 [2]", "[0.0, 0.0]"]),
    "keep": (array("keep", torch.tensor([0.5, 1.5]).double()), ["blocks['keep']", "1.5", "between 0 and 1"]),
    "pin": (lambda e: {**e, "pin": 0.5}, ["pin", "0.5", "(mask, keep, seed)"]),
    "pin of another length": (lambda e: {**e, "pin": ((True,) * 3, 1.0, 0)}, ["pin's mask", "2 bools", "True, True"]),
    "pin's keep": (lambda e: {**e, "pin": (None, 1.5, 0)}, ["pin's keep", "1.5", "between 0 and 1"]),
    "pin's seed": (lambda e: {**e, "pin": (None, 0.5, None)}, ["pin's seed", "None"]),
    "norm shares": (
        lambda e: {**e, "norm_shares": {"order": 2.0, "values": torch.ones(2)}},
        ["norm_shares", "lacks known"],
    ),
    "shard": (lambda e: {**e, "shard": (0, 1)}, ["shard", "(0, 1)", "(dim, start, stop)"]),
    "in_flight": (lambda e: {**e, "in_flight": {"values": torch.ones(2)}}, ["in_flight", "lacks sampled"]),
    "in_flight values": (
        lambda e: {**e, "in_flight": {"values": torch.ones(1), "sampled": None}},
        ["in_flight['values']", "floats [2, 2]", "float32 [1]"],
    ),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_a_wrong_entry_is_one_clear_error_and_changes_nothing(session: Session, case: str):
    """The last of the entries is spoilt, so that taking over the others first would show."""
    spoil, words = ENTRIES[case]
    before, saved = session.state_dict(), session.state_dict()
    saved["parameters"]["0.weight"]["step"] = 77
    saved["parameters"]["1.weight"] = spoil(saved["parameters"]["1.weight"])
    with pytest.raises(ConvAwareError) as error:
        session.load_state_dict(saved)
    assert all(word in str(error.value) for word in ["'1.weight'", *words]), error.value
    assert repr(session.state_dict()) == repr(before)


def test_a_right_one_is_taken_over(session: Session):
    saved = session.state_dict()
    saved["parameters"]["0.weight"]["step"] = 77
    session.load_state_dict(saved)
    assert session.step_count == 77 and repr(session.state_dict()) == repr(saved)


HISTORIES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "step": ({"step": torch.tensor([-1])}, ["step", "from 0", "-1"]),
    "step is endless": ({"step": torch.tensor([2**63 - 1])}, ["step", str(2**62)]),
    "seconds": ({"seconds": torch.tensor([math.nan]).double()}, ["seconds", "finite", "nan"]),
    "saved": ({"saved": torch.tensor([-1.0]).double()}, ["saved", ">= 0", "-1.0"]),
    "stride": ({"stride": 10**25}, ["stride", str(10**25), ">= 1"]),
    "more": ({"more": 1}, ["unknown key", "'more'"]),
}


@pytest.mark.parametrize("case", HISTORIES)
def test_a_wrong_history_is_one_clear_error(session: Session, case: str):
    wrong, words = HISTORIES[case]
    state = session.state_dict()
    one = {name: torch.zeros(1, *value.shape[1:], dtype=value.dtype) for name, value in state["history"].items()
           if isinstance(value, torch.Tensor) and name not in ("flops", "family")}  # fmt: skip
    session.load_state_dict({**state, "history": {**state["history"], **one}})
    before = session.state_dict()
    for read in (session.load_state_dict, lambda state: cacompile.report_state(state, "-")):
        with pytest.raises(ConvAwareError) as error:
            read({**state, "history": {**state["history"], **one, **wrong}})
        assert all(word in str(error.value) for word in ["history", *words]), error.value
    assert repr(session.state_dict()) == repr(before)


def test_what_becomes_of_a_state_that_was_loaded_changes_nothing(session: Session):
    """Even where it waits for the blocks to be known."""
    model = nn.Linear(16, 64, bias=False)
    saved = session.state_dict()
    saved["parameters"] = {"weight": saved["parameters"]["0.weight"]}
    early = cacompile.session(model)
    early.load_state_dict(saved)
    saved["parameters"]["weight"]["blocks"]["age"].fill_(-5)
    saved["parameters"]["weight"]["step"] = -5
    param = early.params["weight"]
    assert param.part(Partition(0, 16, 64), Config(), "weight")
    assert param.age.tolist() == [0] * 4 and param.step == 0
