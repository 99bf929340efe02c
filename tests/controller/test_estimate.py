"""A skipped gradient is what leaves the optimizer's first moment as it is."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim

from cacompile.controller import estimate
from cacompile.controller.monitor import settings_by_param
from cacompile.controller.optimizers.sgd import rms_of
from cacompile.hooks.steps import controllers_of

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
    (optim.RMSprop, {"momentum": 0.9}),
    (optim.RMSprop, {"momentum": 0.9, "weight_decay": 0.1, "maximize": True, "foreach": True}),
    (optim.RMSprop, {"momentum": 0.9, "weight_decay": 0.1, "centered": True}),
]
if hasattr(optim, "Muon"):
    MOMENTS.append((optim.Muon, {"weight_decay": 0.1}))

NO_MOMENT = [
    (optim.SGD, {}),
    (optim.Adagrad, {}),
    (optim.RMSprop, {}),
    (optim.RMSprop, {"centered": True}),
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


def fill(optimizer: optim.Optimizer | None, param: nn.Parameter, state: Any) -> None:
    of_blocks = estimate.weights(state.skipped, state.age)
    estimate.fill(optimizer, settings_by_param(optimizer).get(id(param), {}), state, of_blocks)


@pytest.mark.parametrize(("optimizer_type", "settings"), MOMENTS, ids=lambda v: getattr(v, "__name__", str(v)))
@pytest.mark.parametrize("dim", [0, 1])
def test_momentum_of_skipped_rows_stays(optimizer_type: Any, settings: dict[str, Any], dim: int, make: Any, rows: Any):
    param, state = make(9, 9, dim=dim)
    optimizer = trained(optimizer_type, settings, param)
    before = first_moment(optimizer, param).clone()
    param.grad = torch.randn_like(param)
    fresh = param.grad.clone()
    state.skipped[:] = ~ON
    fill(optimizer, param, state)
    off, on = rows(state, ~ON), rows(state, ON)
    assert torch.equal(param.grad.index_select(dim, on), fresh.index_select(dim, on))
    optimizer.step()
    after = first_moment(optimizer, param)
    rtol = 0.01 if optimizer_type is optim.RMSprop else 1e-5  # the step changes what RMSprop divides by
    torch.testing.assert_close(after.index_select(dim, off), before.index_select(dim, off), rtol=rtol, atol=1e-6)
    assert (after != before).index_select(dim, on).all()


@pytest.mark.parametrize(("optimizer_type", "settings"), MOMENTS, ids=lambda v: getattr(v, "__name__", str(v)))
@pytest.mark.parametrize("dim", [0, 1])
def test_what_is_computed_again_moves_momentum_further(
    optimizer_type: Any, settings: dict[str, Any], dim: int, make: Any, rows: Any
):
    """By the root of the steps since the last time: m + sqrt(k) (m' - m), m' being what the gradient itself makes."""
    param, state = make(9, 9, dim=dim)
    optimizer, other = trained(optimizer_type, settings, param), nn.Parameter(param.detach().clone())
    dense = optimizer_type([other], **{"lr": 0.01, **settings})
    dense.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before, rms = first_moment(optimizer, param).clone(), [divisor(optimizer, param)]
    fresh = torch.randn_like(param)
    param.grad, other.grad = fresh.clone(), fresh.clone()
    state.skipped[1] = True
    state.age[:] = ages = np.array([0, 2, 7, 3, 3])
    fill(optimizer, param, state)
    state.age[:] = 0  # for the hooks, which any other test may have installed: it is done
    never, again = rows(state, ages == 0), rows(state, ages > 2)
    assert torch.equal(param.grad.index_select(dim, never), fresh.index_select(dim, never))
    for each, owner in ((optimizer, param), (dense, other)):
        each.step()
        rms.append(divisor(each, owner))
    root = torch.from_numpy(np.repeat(np.sqrt(ages + 1.0), 2)[:9]).float().unsqueeze(1 - dim)
    mean, new = before * rms[0], first_moment(dense, other) * rms[2]
    if optimizer_type is optim.RMSprop:  # it sums what it has divided, each time by another number
        kept = 0.9 * before
        mean, new = 0.1 * mean, new - kept * rms[2]
        expected = kept + (mean + root * (new - mean)) / rms[1]
    else:
        expected = mean + root * (new - mean)
    after = first_moment(optimizer, param)
    torch.testing.assert_close(after.index_select(dim, again), expected.index_select(dim, again), rtol=1e-5, atol=1e-6)


def divisor(optimizer: optim.Optimizer, param: nn.Parameter) -> torch.Tensor:
    """What gradients are divided by before they are summed up."""
    if isinstance(optimizer, optim.RMSprop):
        return rms_of(optimizer.state[param], optimizer.param_groups[0])
    return torch.ones_like(param)


@pytest.mark.parametrize(("optimizer_type", "settings"), NO_MOMENT, ids=lambda v: getattr(v, "__name__", str(v)))
def test_without_a_first_moment_it_is_zeros(optimizer_type: Any, settings: dict[str, Any], make: Any, rows: Any):
    param, state = make(9, 4)
    optimizer = trained(optimizer_type, settings, param)
    fill_and_expect_zeros(optimizer, param, state, rows)


@pytest.mark.parametrize("case", ["option", "no optimizer", "first step", "momentum of SGD ended", "of RMSprop"])
def test_zeros_where_asked_for_or_nothing_is_known(case: str, make: Any, rows: Any):
    param, state = make(9, 4, estimate="zeros" if case == "option" else "momentum")
    if "of" in case.split():
        optimizer = trained(optim.RMSprop if case == "of RMSprop" else optim.SGD, {"momentum": 0.9}, param)
        optimizer.param_groups[0]["momentum"] = 0.0
    else:
        optimizer = optim.AdamW([param]) if case == "first step" else trained(optim.AdamW, {}, param)
    fill_and_expect_zeros(None if case == "no optimizer" else optimizer, param, state, rows)


def fill_and_expect_zeros(optimizer: optim.Optimizer | None, param: nn.Parameter, state: Any, rows: Any) -> None:
    """Where there is no estimate, what is computed again is left as it is."""
    param.grad = torch.randn_like(param)
    fresh = param.grad.clone()
    state.skipped[:] = ~ON
    state.age[:] = 3
    fill(optimizer, param, state)
    assert not param.grad[rows(state, ~ON)].any()
    assert torch.equal(param.grad[rows(state, ON)], fresh[rows(state, ON)])


def test_decay_that_an_unknown_optimizer_applies_itself_is_left_to_it(make: Any, rows: Any):
    class Lion(optim.Optimizer):
        """Weight decay apart from the gradient, as nearly all optimizers outside torch have it."""

    param, state = make(9, 4)
    optimizer = Lion([param], {"lr": 0.1, "weight_decay": 0.1})
    optimizer.state[param]["exp_avg"] = moment = torch.randn_like(param)
    param.grad = torch.zeros_like(param)
    state.skipped[:] = ~ON
    fill(optimizer, param, state)
    assert torch.equal(param.grad[rows(state, ~ON)], moment[rows(state, ~ON)])


@pytest.mark.parametrize("base", [optim.Optimizer, optim.SGD])
def test_what_an_unknown_optimizer_calls_exp_avg_is_not_used(base: type, make: Any, rows: Any):
    Prodigious = type("Prodigious", (base,), {})
    param, state = make(9, 4)
    optimizer = Prodigious([param], *([{"lr": 0.1}] if base is optim.Optimizer else []))
    optimizer.state[param]["exp_avg"] = torch.randn_like(param)
    fill_and_expect_zeros(optimizer, param, state, rows)


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

    param, state = make(9, 4, warmup_steps=100)
    optimizer = PackedAdam([param])
    optimizer.state[param]["exp_avg"] = torch.ones(9, 4).as_subclass(Packed)
    for _ in range(3):
        before = param.detach().clone()
        param.grad = torch.ones_like(param)
        state.skipped[:] = ~ON
        optimizer.step()
        assert torch.equal(param[rows(state, ~ON)], before[rows(state, ~ON)])
        assert (param != before)[rows(state, ON)].all()
    (said,) = (entry for entry in caplog.records if "PackedAdam" in entry.getMessage())
    assert "zeros" in said.getMessage() and said.exc_info is not None


def test_ages_become_weights_once(make: Any, followed: None):
    """In the step in which the gradient is back; again not in the next, nor when another optimizer wraps the first."""
    param, state = make(9, 4, warmup_steps=100)
    optimizer = trained(optim.AdamW, {}, param)
    optimizer.register_step_pre_hook(
        lambda *_: controllers_of(optimizer)[0].fill(optimizer)
    )  # the second time in a step
    for skipped, k in ((True, 0), (True, 0), (False, 3), (False, 1), (True, 0), (False, 2)):
        before = optimizer.state[param]["exp_avg"].clone()
        param.grad = torch.randn_like(param)
        expected = before + k**0.5 * 0.1 * (param.grad - before)
        state.skipped[:] = skipped
        optimizer.step()
        torch.testing.assert_close(optimizer.state[param]["exp_avg"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("skipped", "age", "weight"), [(True, 0, 0.0), (True, 5, 0.0), (False, 0, 1.0), (False, 1, 2**0.5), (False, 8, 3.0)]
)
def test_weights(skipped: bool, age: int, weight: float):
    found = estimate.weights(np.array([skipped]), np.array([age]))
    assert found.dtype == np.float32 and found.tolist() == [np.float32(weight)]


def test_nothing_happens_without_a_gradient(make: Any):
    param, state = make(9, 4)
    state.skipped[:] = True
    fill(trained(optim.AdamW, {}, param), param, state)
    param.grad = None
    fill(trained(optim.AdamW, {}, param), param, state)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_under_a_gradient_scaler(fused: bool, unscale: bool, make: Any, rows: Any, followed: None):
    """A fused step gets scaled gradients and unscales them itself: the estimate is scaled for it."""
    param, state = make(9, 4, warmup_steps=100)
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
    before, weights = optimizer.state[param]["exp_avg"].clone(), param.detach().clone()
    state.skipped[:] = ~ON
    state.age[:] = ages = np.array([0, 5, 1, 3, 2])
    step()
    after = optimizer.state[param]["exp_avg"]
    root = torch.from_numpy(np.repeat(np.where(ON, np.sqrt(ages + 1.0), 0.0), 2)[:9]).float().unsqueeze(1)
    expected = before + root * 0.1 * (factors + 0.1 * weights - before)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("call", ["positional", "keyword"])
def test_with_a_closure_the_estimate_comes_after_its_backward(
    call: str, make: Any, backward: Any, rows: Any, followed: None
):
    param, state = make(9, 4)
    optimizer = trained(optim.AdamW, {}, param)
    optimizer.zero_grad()
    state.table.set_on(state.rows, ON)
    before = optimizer.state[param]["exp_avg"].clone()

    def closure() -> float:
        optimizer.zero_grad()
        backward(state)
        return 1.5

    loss = optimizer.step(closure) if call == "positional" else optimizer.step(closure=closure)
    assert loss == 1.5
    after = optimizer.state[param]["exp_avg"]
    torch.testing.assert_close(after[rows(state, ~ON)], before[rows(state, ~ON)], rtol=1e-5, atol=1e-7)
    assert (after != before)[rows(state, ON)].all()


def test_a_closure_that_is_called_many_times(make: Any, backward: Any, rows: Any, followed: None):
    param, state = make(9, 4)
    optimizer = optim.LBFGS([param], max_iter=4)
    state.table.set_on(state.rows, ON)
    before, calls = param.detach().clone(), []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        backward(state)
        calls.append(1)
        return param.grad.square().sum()

    optimizer.step(closure)
    assert len(calls) > 1
    assert torch.equal(param[rows(state, ~ON)], before[rows(state, ~ON)])  # no first moment: zeros, every time
    assert (param != before)[rows(state, ON)].all()
