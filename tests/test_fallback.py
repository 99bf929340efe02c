"""Whatever of ours fails, the model trains as under the inner compiler alone, and one warning says what failed."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Block, assert_same, compile_all, train_step

import cacompile
from cacompile import torch_internals
from cacompile.backend import convaware
from cacompile.graph import fallback
from cacompile.passes.verify import Broken

EAGER = {"options": {"inner": "aot_eager", "block_rows": 16}}

WHILE_COMPILING = {
    "an import": ("cacompile.graph.compiled.compile_graph", "compiling a graph"),
    "GraphInputs.of": ("cacompile.graph.compiled.GraphInputs.of", "compiling a graph"),
    "CompiledGraph": ("cacompile.graph.compiled.CompiledGraph.__init__", "compiling a graph"),
    "with_handle": ("cacompile.graph.compiled.with_handle", "compiling a graph"),
    "joint pass": ("cacompile.graph.compiled.CompiledGraph.joint_pass", "compiling a graph"),
    "inner_compile": ("cacompile.graph.compiled.CompiledGraph.inner_compile", "compiling a graph"),
    "find_params": ("cacompile.graph.compiled.find_params", "analysing a joint graph"),
    "make_plan": ("cacompile.graph.compiled.make_plan", "analysing a joint graph"),
    "lower": ("cacompile.graph.compiled.lower", "analysing a joint graph"),
    "save_handle": ("cacompile.graph.compiled.save_handle", "analysing a joint graph"),
    "compile_without_handle": ("cacompile.graph.compiled.compile_without_handle", "compiling a graph"),
    "insert_output_stride": ("cacompile.graph.handle.insert_output_stride", "compiling a graph"),
    "BackwardVersions": ("cacompile.graph.compiled.BackwardVersions", "compiling a backward in versions"),
    "MaskedMaker": ("cacompile.graph.backward.MaskedMaker", "compiling a backward in versions"),
    "donated_inputs": ("cacompile.graph.backward.donated_inputs", "compiling a backward in versions"),
    "follow_optimizers": ("cacompile.graph.calls.follow_optimizers", "binding a graph to its parameters"),
    "GraphBinding": ("cacompile.graph.calls.GraphBinding", "binding a graph to its parameters"),
    "bind": ("cacompile.graph.compiled.CompiledGraph.bind", "compiling a graph"),
}
"""What is made to fail while a graph is compiled or first runs -> what the warning says was being done."""

LATER = {
    "mask_weight_grads": ("cacompile.graph.masked.mask_weight_grads", "could not be made"),
    "verify": ("cacompile.graph.masked.verify", "broke its promise"),
    "compiling_backward": ("cacompile.graph.source.compiling_backward", "could not be compiled"),
    "make": ("cacompile.graph.masked.MaskedMaker.make", "choosing the version of a backward"),
    "wants_masked": ("cacompile.state.binding.GraphBinding.wants_masked", "choosing the version of a backward"),
    "leave_out": ("cacompile.state.binding.GraphBinding.leave_out", "choosing the version of a backward"),
    "count_backward": ("cacompile.state.binding.GraphBinding.count_backward", "choosing the version of a backward"),
}
"""What is made to fail when something is skipped for the first time."""


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was warned of."""
    fallback._said.clear()
    caplog.set_level(logging.WARNING, "cacompile")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.fixture
def breaks(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise Broken("of all things") if "verify" in where[0] else KeyError("of all things")

    where = [""]

    def take(place: str) -> None:
        where[0] = place
        monkeypatch.setattr(place, fail)

    return take


def batch(seed: int = 0) -> list[torch.Tensor]:
    return [torch.randn(8, 32, generator=torch.Generator().manual_seed(seed)).requires_grad_()]


def pair(backend_options: dict[str, Any], against: str) -> tuple[Any, Any]:
    torch._dynamo.reset()
    model = Block()
    twin = copy.deepcopy(model)
    return (model, compile_all(model, "convaware", **backend_options)), (twin, compile_all(twin, against))


@pytest.mark.parametrize("part", WHILE_COMPILING)
def test_a_fault_while_compiling(part: str, breaks: Callable[[str], None], said: Callable[[], list[str]]) -> None:
    place, words = WHILE_COMPILING[part]
    breaks(place)
    ours, theirs = pair(EAGER, "aot_eager")
    for seed in range(2):
        x = batch(seed)
        assert_same(train_step(ours, x), train_step(theirs, x))
    (message,) = said()
    assert words in message and "python -m cacompile doctor" in message and torch.__version__ in message
    session = cacompile.session(ours[0])
    session.pin(keep=0.0)
    assert_same(train_step(ours, x), train_step(theirs, x))
    assert session.flops[1] == 0 and len(said()) == 1


@pytest.mark.parametrize("part", LATER)
def test_a_fault_when_something_is_skipped(
    part: str, breaks: Callable[[str], None], said: Callable[[], list[str]]
) -> None:
    place, words = LATER[part]
    ours, theirs = pair(EAGER, "aot_eager")
    x = batch()
    assert_same(train_step(ours, x), train_step(theirs, x))
    breaks(place)
    cacompile.session(ours[0]).pin(keep=0.0)
    for _ in range(2):
        assert_same(train_step(ours, x), train_step(theirs, x))
    (message,) = said()
    assert words in message
    assert cacompile.session(ours[0]).flops[1] == 0


@pytest.mark.parametrize("part", [pytest.param("BackwardVersions", marks=pytest.mark.slow), "with_handle"])
def test_strides_and_donated_inputs_of_inductor_survive_a_fault(
    part: str, breaks: Callable[[str], None], said: Callable[[], list[str]]
) -> None:
    """The graph is compiled a second time, or half of it without the masked version."""
    breaks(WHILE_COMPILING[part][0])
    ours, theirs = pair({}, "inductor")
    x = batch()
    for _ in range(2):
        assert_same(train_step(ours, x), train_step(theirs, x))
    assert len(said()) == 1


@pytest.mark.thin(4)
@pytest.mark.parametrize(
    "name", [contract.name for contract in torch_internals.CONTRACTS if contract.purpose == torch_internals.COMPILE]
)
def test_a_contract_that_does_not_hold(name: str, said: Callable[[], list[str]]) -> None:
    ours, theirs = pair(EAGER, "aot_eager")
    x = batch()
    with torch_internals.taken_away(name):
        assert_same(train_step(ours, x), train_step(theirs, x))
    (message,) = said()
    assert name in message and "was taken away" in message and "python -m cacompile doctor" in message
    assert not cacompile.session(ours[0]).bindings


def test_a_handle_that_does_not_reach_the_backward(
    monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr("cacompile.graph.compiled.save_handle", lambda *_: None)
    ours, theirs = pair(EAGER, "aot_eager")
    x = batch()
    assert_same(train_step(ours, x), train_step(theirs, x))
    assert [("finding the handle" in message) for message in said()] == [True]


def test_what_the_inner_compiler_cannot_do_is_its_own_error(said: Callable[[], list[str]]) -> None:
    def refuse(gm: Any, inputs: Any) -> Any:
        raise NotImplementedError("this vendor has no addmm")

    model = Block()
    with pytest.raises(Exception, match="this vendor has no addmm"):
        compile_all(model, "convaware", options={"inner": refuse})(*batch())
    assert said() == []


def test_a_torch_that_was_never_tried_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    from cacompile import backend

    monkeypatch.setattr(backend, "release", lambda: "9.9")
    backend._note_untested.cache_clear()
    for _ in range(2):
        ours, theirs = pair(EAGER, "aot_eager")
        x = batch()
        assert_same(train_step(ours, x), train_step(theirs, x))
    (message,) = said()
    assert "not among the releases" in message and "2.15" in message
    assert cacompile.session(ours[0]).bindings, "a warning, not a refusal"


def test_a_reset_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch calls it amid a list of backends, which grows with what decorates functions, and raises if it has."""
    for name in ("cacompile.state.params", "torch._inductor.cudagraph_trees"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    convaware.reset()
    assert "cacompile.state.params" not in sys.modules and "torch._inductor.cudagraph_trees" not in sys.modules
