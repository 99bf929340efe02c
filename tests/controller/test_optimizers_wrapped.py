"""Optimizers within optimizers, compiled, past torch's hooks, or from PyPI: each step of ours is one of theirs."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import lion_pytorch
import numpy as np
import pytest
import pytorch_optimizer
import schedulefree
import torch
from torch import nn, optim

import cacompile
from cacompile.controller.optimizers import estimate_of
from cacompile.hooks.steps import controllers_of
from cacompile.state import binding as binding
from cacompile.state.params import ParamState

STEPS = 6


class Within(optim.Optimizer):
    """Hands its step on, as Lookahead, SAM and gradient projections do."""

    def __init__(self, inner: optim.Optimizer) -> None:
        self.inner = inner
        super().__init__(inner.param_groups, {})
        self.param_groups = inner.param_groups

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self.inner.step(closure)


class Inherited(optim.AdamW):
    """Its parent's step is hooked as well once there is a plain AdamW."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return super().step(closure)


WRAPPED: dict[str, Callable[[list[Any]], optim.Optimizer]] = {
    "within one": lambda params: Within(optim.AdamW(params)),
    "within two": lambda params: Within(Within(optim.AdamW(params))),
    "super().step()": Inherited,
}


@pytest.fixture
def pair(make: Any) -> tuple[list[nn.Parameter], list[ParamState]]:
    made = [make(8, 4, name=f"{i}", monitor_every=2) for i in range(2)]
    return [param for param, _ in made], [state for _, state in made]


def train(optimizer: Any, states: list[ParamState], backward: Any, steps: int = STEPS, seed: int = 0) -> None:
    """From the second step on, every other group is off."""
    torch.manual_seed(seed)
    for i in range(steps):
        optimizer.zero_grad()
        for state in states:
            state.table.set_on(state.rows, np.arange(state.blocks) % 2 == i % 2 if i else True)
            backward(state)
        optimizer.step()


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_a_wrapped_optimizer_steps_once_and_trains_as_it_would_alone(
    wrap: Any, pair: Any, make: Any, backward: Any, followed: None
):
    params, states = pair
    replacements = [make(8, 4, name=f"replacement {i}", monitor_every=2) for i in range(2)]
    for (replacement, _), param in zip(replacements, params):
        replacement.data.copy_(param.data)
    alone = optim.AdamW([replacement for replacement, _ in replacements])
    train(alone, [state for _, state in replacements], backward)
    wrapped = wrap(params)
    train(wrapped, states, backward)
    assert [state.step for state in states] == [STEPS, STEPS]
    for param, state, (replacement, other) in zip(params, states, replacements):
        assert torch.equal(param, replacement)
        assert np.array_equal(state.column("score"), other.column("score"))
        assert np.array_equal(state.column("update_ratio"), other.column("update_ratio"), equal_nan=True)
        assert np.array_equal(state.age, other.age)
    assert wrap is Inherited or controllers_of(wrapped) == []


def test_the_first_step_after_a_restart_is_weighted_by_the_inner_one(pair: Any, backward: Any, followed: None):
    """Before it is known that the outer one only hands on."""
    params, states = pair
    inner = optim.AdamW(params)
    train(inner, states, backward)
    for state in states:
        state.age[:] = 3
        state.skipped[:] = False
    grads = [torch.full_like(param, 2.0) for param in params]
    expected = [m + 2.0 * (g - m) for g, m in zip(grads, (inner.state[p]["exp_avg"].clone() for p in params))]
    for param, grad in zip(params, grads):
        param.grad = grad.clone()
    Within(inner).step()
    for param, grad in zip(params, expected):
        torch.testing.assert_close(param.grad, grad)


class Split(optim.Optimizer):
    """Steps its first parameter itself and leaves the rest to an AdamW, as some implementations of Muon do."""

    def __init__(self, params: list[Any]) -> None:
        super().__init__(params, {})
        self.rest = optim.AdamW(params[1:])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        first = self.param_groups[0]["params"][0]
        first.add_(first.grad, alpha=-0.1)
        self.rest.step()


def test_an_optimizer_that_leaves_some_parameters_to_another(pair: Any, backward: Any, followed: None):
    params, states = pair
    split = Split(params)
    train(split, states, backward)
    assert [state.step for state in states] == [STEPS, STEPS]
    assert [controller.params for controller in controllers_of(split)] == [states[:1]]
    assert [controller.params for controller in controllers_of(split.rest)] == [states[1:]]


def test_a_step_that_failed_leaves_nothing_behind(pair: Any, backward: Any, followed: None):
    params, states = pair
    wrapped = Within(optim.AdamW(params))

    def fail() -> None:
        raise RuntimeError("out of memory")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            wrapped.step(fail)
    train(wrapped, states, backward)
    assert [state.step for state in states] == [STEPS, STEPS]


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_first_step_counts_where_the_first_forward_is_inside_it(wrapped: bool):
    """As in Lightning, whose closure holds forward and backward: nothing is known when the step begins."""
    model = net()
    compiled = torch.compile(model, backend="convaware", options={"block_rows": 16, "inner": "aot_eager"})
    optimizer: Any = optim.AdamW(model.parameters())
    optimizer = Within(optimizer) if wrapped else optimizer

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = compiled(torch.randn(4, 16)).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert cacompile.session(model).step_count == 3


FROM_PYPI: dict[str, Callable[[list[Any]], Any]] = {
    "pytorch_optimizer.Lookahead": lambda params: pytorch_optimizer.Lookahead(optim.AdamW(params)),
    "pytorch_optimizer.SAM": lambda params: pytorch_optimizer.SAM(params, optim.AdamW),
    "schedulefree.AdamW": schedulefree.AdamWScheduleFree,
    "schedulefree.ScheduleFreeWrapper": lambda params: schedulefree.ScheduleFreeWrapper(optim.SGD(params)),
    "lion_pytorch.Lion": lion_pytorch.Lion,
    **{
        f"pytorch_optimizer.{name}": getattr(pytorch_optimizer, name)
        for name in (
            "AdaBelief",
            "AdaBound",
            "AdamP",
            "Adan",
            "DiffGrad",
            "Lamb",
            "Lion",
            "RAdam",
            "StableAdamW",
            "Yogi",
        )
    },
}


@pytest.mark.parametrize("name", FROM_PYPI)
def test_optimizers_from_pypi(name: str, pair: Any, backward: Any, followed: None):
    """Steps are counted once, and the estimate leaves the mean of gradients as it is, where one is known."""
    params, states = pair
    optimizer = FROM_PYPI[name](params)
    if hasattr(optimizer, "train"):
        optimizer.train()

    def gradients() -> None:
        for param, state in zip(params, states):
            param.grad = None
            backward(state)

    for i in range(STEPS):
        for state in states:
            state.table.set_on(state.rows, i < STEPS - 1)
        gradients()
        before = [mean.clone() for param in params for mean in means(optimizer, param)]
        optimizer.step(gradients) if isinstance(optimizer, pytorch_optimizer.SAM) else optimizer.step()
    assert [state.step for state in states] == [STEPS, STEPS]
    assert len(before) == (0 if "schedulefree" in name else len(params))
    after = [mean for param in params for mean in means(optimizer, param)]
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


def means(optimizer: Any, param: torch.Tensor) -> list[torch.Tensor]:
    """What estimates are read from, of the optimizer that does the work."""
    inner = [held for held in vars(optimizer).values() if isinstance(held, optim.Optimizer)]
    optimizer = (inner or [optimizer])[0]
    return [tensor for tensor, _ in estimate_of(optimizer, optimizer.param_groups[0], param)]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))


class Plain:
    """No torch.optim.Optimizer."""

    def __init__(self, model: nn.Module, *, tells: bool) -> None:
        self.model, self.tells = model, tells

    @torch.no_grad()
    def step(self) -> None:
        for param in self.model.parameters():
            param.sub_(param.grad, alpha=0.1)
        if self.tells:
            cacompile.step(self.model)


@pytest.mark.parametrize("how", ["foreign", "foreign, told", "past the hooks", "pinned", "torch's"])
def test_who_never_steps_is_told_once_what_to_call(how: str, caplog: Any, monkeypatch: Any):
    monkeypatch.setattr(binding, "PATIENCE", 4)
    torch._logging._internal.warning_once.cache_clear()
    model = net()
    compiled = torch.compile(model, backend="convaware", options={"block_rows": 16, "inner": "aot_eager"})
    optimizer: Any = Plain(model, tells=how == "foreign, told")
    if how in ("past the hooks", "torch's"):
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        if how == "past the hooks":
            optimizer.step = optimizer.step.__wrapped__.__get__(optimizer)
    with caplog.at_level(logging.WARNING, logger="cacompile"):
        for _ in range(13):
            compiled(torch.randn(4, 16)).square().mean().backward()
            if how == "pinned":
                cacompile.session(model).pin(keep=0.5)
            optimizer.step()
            model.zero_grad()
    said = [record.getMessage() for record in caplog.records if "cacompile.step(model)" in record.getMessage()]
    assert len(said) == (how in ("foreign", "past the hooks"))
    assert cacompile.session(model).step_count == (13 if how in ("foreign, told", "torch's") else 0)


@pytest.mark.parametrize("how", ["plain", "compiled", "fused", "foreach"])
def test_ways_to_run_a_step_skip_alike(how: str):
    torch.manual_seed(0)
    model = net()
    compiled = torch.compile(
        model, backend="convaware", options={"block_rows": 16, "warmup_steps": 0, "inner": "aot_eager"}
    )
    optimizer = optim.AdamW(model.parameters(), **({how: True} if how in ("fused", "foreach") else {}))
    step = torch.compile(optimizer.step) if how == "compiled" else optimizer.step
    for i in range(4):
        compiled(torch.randn(4, 16)).square().mean().backward()
        if i == 1:
            cacompile.session(model).pin(keep=0.5, seed=1)
        if i == 3:
            before = copy.deepcopy(optimizer.state[model[0].weight]["exp_avg"])
            off = torch.from_numpy(~cacompile.session(model).params["0.weight"].on).repeat_interleave(16)
        step()
        optimizer.zero_grad()
    assert cacompile.session(model).step_count == 4 and off.any() and not off.all()
    after = optimizer.state[model[0].weight]["exp_avg"]
    torch.testing.assert_close(after[off], before[off])
    assert not torch.isclose(after[~off], before[~off]).all()
