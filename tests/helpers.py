"""One comparison for every scenario: convaware against plain Inductor on an equal copy, all on and then with a mask."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn
from torch._inductor.compile_fx import compile_fx

import cacompile
from cacompile.sessions.session import Session

OPTIONS = {"block_rows": 16, "warmup_steps": 10**6}

STAND_INS: dict[str, Any] = {}
"""Backends that `compile_all` takes in the place of torch's, by name: see `interpreted`."""

Compiled = tuple[nn.Module, Callable[..., Any]]
"""A module, for its parameters, and what is called in its place."""


def compile_all(model: nn.Module, backend: str, **settings: Any) -> Callable[..., Any]:
    """torch.compile with our options where they belong."""
    if backend == "convaware":
        settings = {**settings, "options": {**OPTIONS, **settings.get("options", {})}}
    return torch.compile(model, backend=STAND_INS.get(backend, backend), **settings)


def interpret(gm: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
    """In place of Inductor's last step, which makes C++ of a graph: the graph, operation by operation."""
    return make_boxed_func(gm.forward)


@pytest.fixture
def interpreted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """For files in which Inductor's graphs are looked at, not its code, but for tests marked `compiled`."""
    if request.node.get_closest_marker("compiled") is None:
        monkeypatch.setattr("cacompile.graph.inner.compile_fx_inner", interpret)
        monkeypatch.setitem(STAND_INS, "inductor", functools.partial(compile_fx, inner_compile=interpret))


def square_mean(output: Any) -> Tensor:
    """A loss for outputs of any kind; every entry counts, each a little differently."""
    outputs = output if isinstance(output, (tuple, list)) else [output]
    return sum((o.float().square().sum() + o.float().sum()) / max(1, o.numel()) for o in outputs)


@dataclass
class Step:
    """What one forward and backward gave."""

    loss: Tensor
    grads: dict[str, Tensor | None]


def train_step(compiled: Compiled, inputs: Sequence[Any], loss_of: Callable[[Any], Tensor] = square_mean) -> Step:
    """One forward and backward from clean gradients; inputs that want gradients appear as input0, input1, ..."""
    model, call = compiled
    model.zero_grad(set_to_none=True)
    inputs = [i.detach().clone().requires_grad_(i.requires_grad) if isinstance(i, Tensor) else i for i in inputs]
    loss = loss_of(call(*inputs))
    if loss.requires_grad:
        loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    grads |= {f"input{i}": t.grad for i, t in enumerate(inputs) if isinstance(t, Tensor) and t.requires_grad}
    return Step(loss.detach(), {name: None if g is None else g.clone() for name, g in grads.items()})


def masks(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    """Parameter name -> (dimension, bool for each index of it) of the parameters that have groups."""
    found = {}
    for name, state in cacompile.session(model).params.items():
        if state.partition is not None:
            on = torch.from_numpy(state.on.copy()).repeat_interleave(state.partition.block)
            found[name] = state.partition.dim, on[: state.partition.rows]
    return found


def assert_same(ours: Step, dense: Step) -> None:
    """Loss and all gradients bit for bit."""
    assert torch.equal(ours.loss, dense.loss), f"loss {ours.loss} != {dense.loss}"
    assert ours.grads.keys() == dense.grads.keys()
    for name, expected in dense.grads.items():
        assert_bits(ours.grads[name], expected, name)


def assert_bits(actual: Tensor | None, expected: Tensor | None, name: str) -> None:
    assert (actual is None) == (expected is None), f"{name}: one has no gradient"
    if actual is not None and expected is not None:
        assert actual.shape == expected.shape and actual.dtype == expected.dtype, name
        assert torch.equal(actual, expected), f"{name}: differs by up to {(actual - expected).abs().max()}"


def assert_masked(
    ours: Step, dense: Step, masks: dict[str, tuple[int, Tensor]], rtol: float = 1e-5, near: Sequence[str] = ()
) -> None:
    """Rows that are on are the dense ones, within rounding; rows that are off exactly zero; all else bit for bit."""
    masks = masks | {name: (0, torch.ones(len(dense.grads[name]), dtype=torch.bool)) for name in near}
    assert torch.equal(ours.loss, dense.loss)
    for name, expected in dense.grads.items():
        actual = ours.grads[name]
        if name not in masks:
            assert_bits(actual, expected, name)
            continue
        assert actual is not None and expected is not None, name
        dim, on = masks[name]
        actual, expected = actual.movedim(dim, 0), expected.movedim(dim, 0)
        scale = float(expected.abs().max())
        torch.testing.assert_close(
            actual[on], expected[on], rtol=0, atol=rtol * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert not actual[~on].any(), f"{name}: a row that is off has a gradient"


def compare(
    make_model: Callable[[], nn.Module],
    make_inputs: Callable[[], Sequence[Any]],
    *,
    grouped: Sequence[str] | None = None,
    stays: dict[str, str] | None = None,
    rtol: float = 1e-5,
    near: Sequence[str] = (),
    loss_of: Callable[[Any], Tensor] = square_mean,
    compile_it: Callable[..., Callable[..., Any]] = compile_all,
    **settings: Any,
) -> nn.Module:
    """The core check of a scenario; returns our model, still pinned to the mixed mask.

    grouped: parameters that must have groups, exactly. stays: parameter -> words of the reason why it stays dense.
    near: gradients beside the masked ones that a mask may change within rounding (rtol).
    compile_it(model, backend, **settings) gives the callable to train.
    """
    model = make_model()
    twin = copy.deepcopy(model)
    inputs = make_inputs()
    theirs = twin, compile_it(twin, "inductor", **settings)
    ours = model, compile_it(model, "convaware", **settings)
    dense = train_step(theirs, inputs, loss_of)
    assert_same(train_step(ours, inputs, loss_of), dense)
    session = cacompile.session(model)
    assert session.mask.all()
    assert not any(i.masked_backwards for i in session.bindings), "all groups on, yet something was skipped"
    if grouped is not None:
        assert set(masks(model)) == set(grouped)
    reasons = {skip.param: skip.reason for i in session.bindings for skip in i.layout.dense}
    for name, words in (stays or {}).items():
        assert words in reasons[name], f"{name}: {reasons[name]}"
    pin_mixed(session)
    assert_masked(train_step(ours, inputs, loss_of), dense, masks(model), rtol, near)
    assert any(i.masked_backwards for i in session.bindings), "nothing was skipped"
    assert 0 < session.flops[1] < session.flops[0]
    return model


def pin_mixed(session: Session) -> None:
    """Pin a random mask in which every parameter with two groups or more has some on and some off."""
    states = {name: r for name, r in session.params.items() if r.blocks > 1}
    assert states, "no parameter has two groups"
    for seed in range(200):
        session.pin(keep=0.5, seed=seed)
        if all(0 < r.on.sum() < r.blocks for r in states.values()):
            return
    raise AssertionError("no mixed mask found")


def mlp(*, width: int = 32, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two linear layers with a norm between them."""
    return nn.Sequential(
        nn.Linear(width, 2 * width, bias=bias, dtype=dtype),
        nn.LayerNorm(2 * width, dtype=dtype),
        nn.GELU(),
        nn.Linear(2 * width, width, bias=bias, dtype=dtype),
    )


class Block(nn.Module):
    """A residual MLP block, with a forward of its own."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))
