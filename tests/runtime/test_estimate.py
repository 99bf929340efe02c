"""A skipped gradient is what leaves the optimizer's first moment as it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim

from cacompile.runtime.estimate import fill_skipped
from cacompile.runtime.monitor import settings_by_param

MOMENTS = [
    (optim.Adam, {}),
    (optim.Adam, {"weight_decay": 0.1}),
    (optim.Adam, {"weight_decay": 0.1, "maximize": True, "amsgrad": True}),
    (optim.Adam, {"weight_decay": 0.1, "foreach": True}),
    (optim.Adam, {"weight_decay": 0.1, "fused": True}),
    (optim.Adam, {"weight_decay": 0.1, "capturable": False, "lr": torch.tensor(0.01)}),
    (optim.AdamW, {}),
    (optim.AdamW, {"maximize": True, "foreach": True}),
    (optim.AdamW, {"fused": True}),
    (optim.NAdam, {"weight_decay": 0.1}),
    (optim.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True, "foreach": True}),
    (optim.RAdam, {"weight_decay": 0.1}),
    (optim.RAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True}),
    (optim.Adamax, {"weight_decay": 0.1, "maximize": True}),
    (optim.SGD, {"momentum": 0.9}),
    (optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (optim.SGD, {"momentum": 0.8, "dampening": 0.5, "weight_decay": 0.1, "maximize": True}),
    (optim.SGD, {"momentum": 0.9, "dampening": 0.3, "foreach": True}),
    (optim.SGD, {"momentum": 0.9, "weight_decay": 0.1, "fused": True}),
]
if hasattr(optim, "Muon"):
    MOMENTS.append((optim.Muon, {"weight_decay": 0.1}))

NO_MOMENT = [
    (optim.SGD, {}),
    (optim.Adagrad, {}),
    (optim.RMSprop, {}),
    (optim.RMSprop, {"momentum": 0.9}),
    (optim.Adadelta, {}),
    (optim.ASGD, {}),
    (optim.Rprop, {}),
    (optim.Adafactor, {}),
]

ON = np.array([True, False, False, True, False])


def first_moment(optimizer: optim.Optimizer, param: nn.Parameter) -> torch.Tensor:
    state = optimizer.state[param]
    return state["exp_avg"] if "exp_avg" in state else state["momentum_buffer"]


def trained(optimizer_type: Any, settings: dict[str, Any], param: nn.Parameter) -> optim.Optimizer:
    """The optimizer after a few dense steps."""
    optimizer = optimizer_type([param], **{"lr": 0.01, **settings})
    for _ in range(4):
        param.grad = torch.randn_like(param)
        optimizer.step()
    return optimizer


def fill(optimizer: optim.Optimizer | None, param: nn.Parameter, record: Any) -> None:
    fill_skipped(optimizer, settings_by_param(optimizer).get(id(param), {}), record)


@pytest.mark.parametrize(("optimizer_type", "settings"), MOMENTS, ids=lambda v: getattr(v, "__name__", str(v)))
@pytest.mark.parametrize("dim", [0, 1])
def test_momentum_of_skipped_rows_stays(optimizer_type: Any, settings: dict[str, Any], dim: int, make: Any, rows: Any):
    param, record = make(9, 9, dim=dim)
    optimizer = trained(optimizer_type, settings, param)
    before = first_moment(optimizer, param).clone()
    param.grad = torch.randn_like(param)
    fresh = param.grad.clone()
    record.skipped[:] = ~ON
    fill(optimizer, param, record)
    off, on = rows(record, ~ON), rows(record, ON)
    assert torch.equal(param.grad.index_select(dim, on), fresh.index_select(dim, on))
    optimizer.step()
    after = first_moment(optimizer, param)
    torch.testing.assert_close(after.index_select(dim, off), before.index_select(dim, off), rtol=1e-5, atol=1e-6)
    assert (after != before).index_select(dim, on).all()


@pytest.mark.parametrize(("optimizer_type", "settings"), NO_MOMENT, ids=lambda v: getattr(v, "__name__", str(v)))
def test_without_a_first_moment_it_is_zeros(optimizer_type: Any, settings: dict[str, Any], make: Any, rows: Any):
    param, record = make(9, 4)
    optimizer = trained(optimizer_type, settings, param)
    param.grad = torch.randn_like(param)
    record.skipped[:] = ~ON
    fill(optimizer, param, record)
    assert not param.grad[rows(record, ~ON)].any() and param.grad[rows(record, ON)].all()


@pytest.mark.parametrize("case", ["option", "no optimizer", "first step"])
def test_zeros_where_asked_for_or_nothing_is_known(case: str, make: Any, rows: Any):
    param, record = make(9, 4, estimate="zeros" if case == "option" else "momentum")
    optimizer = optim.AdamW([param]) if case == "first step" else trained(optim.AdamW, {}, param)
    param.grad = torch.randn_like(param)
    record.skipped[:] = ~ON
    fill(None if case == "no optimizer" else optimizer, param, record)
    assert not param.grad[rows(record, ~ON)].any() and param.grad[rows(record, ON)].all()


def test_decay_that_an_unknown_optimizer_applies_itself_is_left_to_it(make: Any, rows: Any):
    class Lion(optim.Optimizer):
        """Weight decay apart from the gradient, as nearly all optimizers outside torch have it."""

    param, record = make(9, 4)
    optimizer = Lion([param], {"lr": 0.1, "weight_decay": 0.1})
    optimizer.state[param]["exp_avg"] = moment = torch.randn_like(param)
    param.grad = torch.zeros_like(param)
    record.skipped[:] = ~ON
    fill(optimizer, param, record)
    assert torch.equal(param.grad[rows(record, ~ON)], moment[rows(record, ~ON)])


@pytest.mark.parametrize("base", [optim.Optimizer, optim.SGD])
def test_what_an_unknown_optimizer_calls_exp_avg_is_not_used(base: type, make: Any, rows: Any):
    Prodigious = type("Prodigious", (base,), {})
    param, record = make(9, 4)
    optimizer = Prodigious([param], *([{"lr": 0.1}] if base is optim.Optimizer else []))
    optimizer.state[param]["exp_avg"] = torch.randn_like(param)
    param.grad = torch.randn_like(param)
    record.skipped[:] = ~ON
    fill(optimizer, param, record)
    assert not param.grad[rows(record, ~ON)].any() and param.grad[rows(record, ON)].all()


def test_a_state_that_cannot_be_used_gives_zeros_and_one_warning(
    make: Any, rows: Any, followed: None, caplog: pytest.LogCaptureFixture
):
    class Packed(torch.Tensor):
        """A moment in some format of its own."""

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.Tensor.narrow:
                raise NotImplementedError("of all things")
            return super().__torch_function__(func, types, args, kwargs or {})

    class PackedAdam(optim.Adam):
        """Steps as SGD does."""

        def step(self) -> None:
            with torch.no_grad():
                param.sub_(param.grad, alpha=0.1)

    param, record = make(9, 4, warmup_steps=100)
    optimizer = PackedAdam([param])
    optimizer.state[param]["exp_avg"] = torch.ones(9, 4).as_subclass(Packed)
    for _ in range(3):
        before = param.detach().clone()
        param.grad = torch.ones_like(param)
        record.skipped[:] = ~ON
        optimizer.step()
        assert torch.equal(param[rows(record, ~ON)], before[rows(record, ~ON)])
        assert (param != before)[rows(record, ON)].all()
    (said,) = (entry for entry in caplog.records if "PackedAdam" in entry.getMessage())
    assert "zeros" in said.getMessage() and said.exc_info is not None


def test_nothing_happens_without_a_gradient(make: Any):
    param, record = make(9, 4)
    record.skipped[:] = True
    fill(trained(optim.AdamW, {}, param), param, record)
    param.grad = None
    fill(trained(optim.AdamW, {}, param), param, record)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_under_a_gradient_scaler(fused: bool, unscale: bool, make: Any, rows: Any, followed: None):
    """A fused step gets scaled gradients and unscales them itself: the estimate is scaled for it."""
    param, record = make(9, 4, warmup_steps=100)
    optimizer = optim.Adam([param], weight_decay=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    factors = torch.randn_like(param)

    def step() -> None:
        optimizer.zero_grad()
        scaler.scale((param * factors).sum()).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    for _ in range(3):
        step()
    before = optimizer.state[param]["exp_avg"].clone()
    record.skipped[:] = ~ON
    step()
    after = optimizer.state[param]["exp_avg"]
    torch.testing.assert_close(after[rows(record, ~ON)], before[rows(record, ~ON)], rtol=1e-5, atol=1e-7)
    assert (after != before)[rows(record, ON)].all()


@pytest.mark.parametrize("call", ["positional", "keyword"])
def test_with_a_closure_the_estimate_comes_after_its_backward(
    call: str, make: Any, backward: Any, rows: Any, followed: None
):
    param, record = make(9, 4)
    optimizer = trained(optim.AdamW, {}, param)
    optimizer.zero_grad()
    record.state.on[:] = ON
    before = optimizer.state[param]["exp_avg"].clone()

    def closure() -> float:
        optimizer.zero_grad()
        backward(record)
        return 1.5

    loss = optimizer.step(closure) if call == "positional" else optimizer.step(closure=closure)
    assert loss == 1.5
    after = optimizer.state[param]["exp_avg"]
    torch.testing.assert_close(after[rows(record, ~ON)], before[rows(record, ~ON)], rtol=1e-5, atol=1e-7)
    assert (after != before)[rows(record, ON)].all()


def test_a_closure_that_is_called_many_times(make: Any, backward: Any, rows: Any, followed: None):
    param, record = make(9, 4)
    optimizer = optim.LBFGS([param], max_iter=4)
    record.state.on[:] = ON
    before, calls = param.detach().clone(), []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        backward(record)
        calls.append(1)
        return param.grad.square().sum()

    optimizer.step(closure)
    assert len(calls) > 1
    assert torch.equal(param[rows(record, ~ON)], before[rows(record, ~ON)])  # no first moment: zeros, every time
    assert (param != before)[rows(record, ON)].all()
