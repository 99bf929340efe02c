"""Versions that a thread compiles while the dense one serves: the option `switch`."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import Block, assert_masked, assert_same, compile_all, masks, pin_mixed, train_step
from torch import nn
from torch._dynamo.utils import counters

import cacompile
from cacompile.graph.source import BackwardSource
from cacompile.state.binding import GraphBinding
from cacompile.torch_internals import CAN_COMPILE_ASIDE

SWITCH = {"options": {"switch": "when compiled"}}

only_where_it_can = pytest.mark.skipif(not CAN_COMPILE_ASIDE, reason="Inductor's settings are the process's own")


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing but dense versions is compiled before this is set."""
    may_go, compile_it = threading.Event(), BackwardSource.compile

    def wait(*args: Any, **settings: Any) -> Any:
        assert may_go.wait(60)
        return compile_it(*args, **settings)

    monkeypatch.setattr(BackwardSource, "compile", wait)
    yield may_go
    may_go.set()
    finish()


def finish() -> None:
    for thread in threading.enumerate():
        if thread.name == "convaware compile":
            thread.join()


@only_where_it_can
@pytest.mark.parametrize("inner", ["inductor", "aot_eager"])
def test_the_dense_version_serves_until_then(compiler: threading.Event, inner: str) -> None:
    counters.clear()
    options = {"options": {**SWITCH["options"], "inner": inner}}
    model, x = Block(), [torch.randn(8, 32)]
    replacement = copy.deepcopy(model)
    ours = model, compile_all(model, "convaware", **options)
    dense = train_step((replacement, compile_all(replacement, inner)), x)
    assert_same(train_step(ours, x), dense)
    session = cacompile.session(model)
    pin_mixed(session)
    for _ in range(3):
        assert_same(train_step(ours, x), dense)
    assert cacompile.status(model).saved_flops == 0, "what is computed is not counted as skipped"
    compiler.set()
    finish()
    assert_masked(train_step(ours, x), dense, masks(model))
    assert counters["cacompile"]["versions compiled: masked"] == 1
    session.freeze("up")
    frozen = train_step(ours, x)
    finish()
    assert frozen.grads["up.weight"] is None is train_step(ours, x).grads["up.weight"]
    assert counters["cacompile"]["versions compiled: truncated"] >= 1


@only_where_it_can
def test_the_whole_forward_runs_until_a_lean_one_is_there(compiler: threading.Event) -> None:
    counters.clear()
    model, x = nn.Sequential(Block(), Block()), [torch.randn(8, 32)]
    ours = model, compile_all(model, "convaware", options={**SWITCH["options"], "inner": "aot_eager"})
    dense = train_step(ours, x)
    cacompile.session(model).freeze("0")
    expected = {name: None if name.startswith("0.") else grad for name, grad in dense.grads.items()}
    for _ in range(2):
        assert_same(train_step(ours, x), replace(dense, grads=expected))
    assert not counters["cacompile"]["versions compiled: lean forward"]
    compiler.set()
    for _ in range(3):  # the truncated backward, the forward for it, both
        finish()
        assert_same(train_step(ours, x), replace(dense, grads=expected))
    assert counters["cacompile"]["versions compiled: truncated"] == 1
    assert counters["cacompile"]["versions compiled: lean forward"] == 1


def test_ranks_with_copies_switch_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One would skip what the other computes, as their threads are not equally fast."""
    monkeypatch.setattr(GraphBinding, "look_for_replicas", lambda self: setattr(self, "alone", False))
    model, x = Block(), [torch.randn(8, 32)]
    ours = model, compile_all(model, "convaware", **SWITCH)
    dense = train_step(ours, x)
    pin_mixed(cacompile.session(model))
    assert_masked(train_step(ours, x), dense, masks(model))


@only_where_it_can
def test_a_version_that_cannot_be_compiled_leaves_the_dense_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(BackwardSource, "compile", fail)
    model, x = Block(), [torch.randn(8, 32)]
    ours = model, compile_all(model, "convaware", **SWITCH)
    dense = train_step(ours, x)
    pin_mixed(cacompile.session(model))
    for _ in range(2):
        assert_same(train_step(ours, x), dense)
        finish()


def test_without_the_option_a_step_waits(compiler: threading.Event) -> None:
    compiler.set()
    model, x = Block(), [torch.randn(8, 32)]
    ours = model, compile_all(model, "convaware")
    dense = train_step(ours, x)
    pin_mixed(cacompile.session(model))
    assert_masked(train_step(ours, x), dense, masks(model))
