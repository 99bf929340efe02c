"""Expected descent is what a step wins of the loss, per unit of learning rate, as the optimizer really steps."""

from __future__ import annotations

import re
from typing import Any

import pytest
import pytorch_optimizer
import torch
from torch import nn, optim

import cacompile
from cacompile.controller import optimizers
from cacompile.controller.monitor import settings_by_param
from cacompile.controller.optimizers import (
    Kept,
    OptimizerAdapter,
    Statistic,
    descent,
    estimate_of,
    gradient_statistic,
    statistic_of,
)
from cacompile.errors import ConvAwareError

LR = 1e-6
STEPS = 300


class Lion(optim.Optimizer):
    """As in its paper (Chen et al. 2023)."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.95)})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            slow, fast = group["betas"]
            for param in group["params"]:
                mean = self.state[param].setdefault("exp_avg", torch.zeros_like(param))
                param.sub_(mean.lerp(param.grad, 1.0 - slow).sign(), alpha=group["lr"])
                mean.lerp_(param.grad, 1.0 - fast)


AVERAGED = [
    (optim.Adam, {}),
    (optim.Adam, {"amsgrad": True, "foreach": True}),
    (optim.Adam, {"maximize": True, "fused": True}),
    (optim.AdamW, {"lr": torch.tensor(LR, dtype=torch.float64), "weight_decay": 0.0}),
    (optim.NAdam, {}),
    (optim.Adamax, {"foreach": True}),
    (optim.SGD, {"momentum": 0.9}),
    (optim.SGD, {"momentum": 0.8, "dampening": 0.5, "maximize": True}),
    (optim.SGD, {"momentum": 0.9, "nesterov": True}),
    (optim.RMSprop, {"momentum": 0.9, "alpha": 0.9}),
    (Lion, {}),
]

SAMPLED = [
    (optim.SGD, {}),
    (optim.RMSprop, {}),
    (optim.Adagrad, {}),
    (optim.Adafactor, {"d": 2.0}),
    (optim.Adafactor, {"maximize": True}),
]


def named(value: Any) -> str:
    return getattr(value, "__name__", str(value))


def stepped(kind: Any, settings: dict[str, Any], param: nn.Parameter, grads: list[torch.Tensor]) -> Any:
    """The optimizer after many steps with these gradients in turn; the mean update of the last ones, per unit of lr."""
    optimizer = kind([param], **{"lr": LR, **settings})
    for i in range(STEPS):
        if i == STEPS - len(grads):
            before = param.detach().clone()
        param.grad = grads[i % len(grads)].clone()
        optimizer.step()
    sign = -1.0 if settings.get("maximize") else 1.0
    return optimizer, sign * (before - param.detach()) / LR / len(grads)


def found(optimizer: Any, param: nn.Parameter) -> Any:
    return statistic_of(optimizer, settings_by_param(optimizer)[id(param)], param, STEPS)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize(("kind", "settings"), AVERAGED + SAMPLED, ids=named)
@pytest.mark.parametrize("shape", [(6, 4), (5,)], ids=str)
def test_of_gradients_that_are_always_the_same(kind: Any, settings: dict[str, Any], shape: Any):
    """Then the expected gradient is known, and so is the update."""
    param = parameter(*shape)
    grad = torch.randn_like(param)
    optimizer, update = stepped(kind, settings, param, [grad])
    statistic = found(optimizer, param)
    averaged = (kind, settings) in AVERAGED
    assert averaged == (statistic is not None and statistic.averaged)
    torch.testing.assert_close(descent(statistic or gradient_statistic(param)), grad * update, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize(("kind", "averaged"), [(optim.RAdam, True), (optim.RMSprop, False)], ids=named)
def test_of_gradients_that_vary(kind: Any, averaged: bool):
    """RAdam: but for a factor that all elements share. RMSprop: centered, so it has a mean of gradients."""
    param = parameter(6, 4)
    grad = torch.randn_like(param)
    settings = {"centered": True} if kind is optim.RMSprop else {}
    optimizer, update = stepped(kind, settings, param, [1.5 * grad, 0.5 * grad])
    statistic = found(optimizer, param)
    ratio = descent(statistic) / (grad * update)
    assert statistic.averaged == averaged
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=0.02, atol=0.0)
    assert kind is optim.RAdam or float(ratio.mean()) == pytest.approx(1.0, rel=0.1)


def adam_mini(params: list[nn.Parameter], **settings: Any) -> Any:
    """It asks for a module."""
    holder = nn.Module()
    holder.weight = params[0]
    return pytorch_optimizer.AdamMini(holder, **settings)


THIRD = {
    "AdaBelief": (pytorch_optimizer.AdaBelief, {}, 0.01),
    "AdaBound": (pytorch_optimizer.AdaBound, {"final_lr": LR, "gamma": 1.0}, 0.01),
    "AdaBound, unbounded": (pytorch_optimizer.AdaBound, {"final_lr": 1e3, "gamma": 1e-9}, 0.01),
    "AdamMini": (adam_mini, {}, 0.01),
    "AdamP": (pytorch_optimizer.AdamP, {}, 0.01),
    "Adan": (pytorch_optimizer.Adan, {}, 0.01),
    "DiffGrad": (pytorch_optimizer.DiffGrad, {}, 0.6),  # a factor between 1/2 and 1 for each element, of one gradient
    "Lamb": (pytorch_optimizer.Lamb, {}, 0.01),
    "Lamb of sums": (pytorch_optimizer.Lamb, {"grad_averaging": False}, 0.01),
    "Lion": (pytorch_optimizer.Lion, {}, 0.01),
    "StableAdamW": (pytorch_optimizer.StableAdamW, {}, 0.01),
    "Yogi": (pytorch_optimizer.Yogi, {}, 0.01),
}


@pytest.mark.parametrize("name", THIRD)
def test_one_mean_for_estimate_and_score(name: str):
    """Of optimizers outside torch: the estimate is the mean gradient, and descent its product with the real update."""
    kind, settings, spread = THIRD[name]
    param = parameter(6, 4)
    grad = torch.randn_like(param)
    optimizer, update = stepped(kind, {"weight_decay": 0.0, **settings}, param, [1.5 * grad, 0.5 * grad])
    ((mean, factor),) = estimate_of(optimizer, optimizer.param_groups[0], param)
    torch.testing.assert_close(mean * factor, grad.to(mean.dtype), rtol=0.06, atol=0.0)
    statistic = found(optimizer, param)
    ratio = descent(statistic) / (grad * update)
    assert statistic.averaged and 0.9 < float(ratio.mean()) < 1.6
    assert float(ratio.std() / ratio.mean()) < spread


def test_maximizing_turns_the_estimate_of_every_optimizer():
    """torch keeps it among a group's settings, others on the optimizer."""
    for kind in (optim.AdamW, pytorch_optimizer.AdaBelief):
        param = parameter(6, 4)
        grad = torch.randn_like(param)
        optimizer, _ = stepped(kind, {"maximize": True, "weight_decay": 0.0}, param, [grad])
        ((mean, factor),) = estimate_of(optimizer, optimizer.param_groups[0], param)
        torch.testing.assert_close(mean * factor, grad)


class Mean(OptimizerAdapter):
    """Of an optimizer that keeps its mean under another name."""

    keeps_mean = True

    def mean_gradient(self, kept: Kept) -> Any:
        mean = kept.tensor("mean")
        return None if mean is None else (mean, 1.0)


class Own(optim.Optimizer):
    """A user's."""


class Derived(Own):
    pass


@pytest.fixture
def registry_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    for table in ("_by_class", "_by_name", "_found"):
        monkeypatch.setattr(optimizers, table, dict(getattr(optimizers, table)))


@pytest.mark.usefixtures("registry_as_before")
@pytest.mark.parametrize("kind", [Own, "Own", "test_optimizers.Own"])
def test_a_user_registers_an_adapter(kind: Any):
    param = parameter(6, 4)
    optimizer = Own([param], {"lr": 0.1})
    optimizer.state[param]["mean"] = torch.ones_like(param)
    assert estimate_of(optimizer, optimizer.param_groups[0], param) == []
    cacompile.register_optimizer(kind, Mean())
    ((mean, factor),) = estimate_of(optimizer, optimizer.param_groups[0], param)
    assert mean is optimizer.state[param]["mean"] and factor == 1.0
    derived = optimizers.adapter_of(Derived([param], {"lr": 0.1}))
    assert isinstance(derived, Mean) == (kind is Own), "a name stands for classes of that name alone"


@pytest.mark.usefixtures("registry_as_before")
@pytest.mark.parametrize(
    ("kind", "adapter", "words"),
    [
        (nn.Linear, Mean(), ["optimizer", "Linear", "torch.optim.Optimizer"]),
        ("a.b.Own", Mean(), ["optimizer", "'a.b.Own'", "package.Name"]),
        (3, Mean(), ["optimizer", "3"]),
        (Own, Mean, ["adapter", "instance", "Mean"]),
        (Own, None, ["adapter", "None"]),
    ],
)
def test_a_wrong_registration_is_one_clear_error(kind: Any, adapter: Any, words: list[str]):
    before = dict(optimizers._by_class), dict(optimizers._by_name)
    with pytest.raises(ConvAwareError) as error:
        cacompile.register_optimizer(kind, adapter)
    assert all(word in str(error.value) for word in words), error.value
    assert (optimizers._by_class, optimizers._by_name) == before


@pytest.mark.usefixtures("registry_as_before")
@pytest.mark.parametrize(
    ("method", "says", "words"),
    [
        ("statistic", lambda kept: 3, "a statistic must be a Statistic or None, got 3"),
        ("statistic", lambda kept: Statistic((), rule=lambda: torch.ones(64, 1)), "a descent must have the shape"),
        ("statistic", lambda kept: 1 / 0, "division by zero"),
        ("mean_gradient", lambda kept: (torch.ones(2, 16), 1.0), r"shape \[64, 16\], got tensor"),
        ("mean_gradient", lambda kept: (3.0, 1.0), "a term of an estimate must be a tensor .* got 3.0"),
        ("mean_gradient", lambda kept: 1 / 0, "division by zero"),
    ],
)
def test_an_adapter_that_is_wrong_warns_and_training_goes_on(
    method: str, says: Any, words: str, caplog: pytest.LogCaptureFixture
):
    """Strides of the first wrong mean are those of the gradient, so that nothing else tells them apart."""
    torch._dynamo.reset()
    wrong = type("Wrong", (Mean,), {method: lambda self, kept: says(kept) if kept.param.dim() == 2 else None})()
    optimizer_type = type(f"Wrong{method}{words}", (optim.SGD,), {})  # each name is warned of once
    cacompile.register_optimizer(optimizer_type, wrong)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
    options = {"inner": "aot_eager", "block_rows": 16, "monitor_every": 1, "warmup_steps": 1}
    run, optimizer = torch.compile(model, backend="convaware", options=options), optimizer_type(model.parameters())
    cacompile.session(model).pin({"0.weight": False} if method == "mean_gradient" else {})
    for _ in range(3):
        run(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
    assert all(bool(param.isfinite().all()) for param in model.parameters())
    errors = [str(entry.exc_info[1]) for entry in caplog.records if entry.exc_info]
    assert any(re.search(words, error) for error in errors), caplog.text


@pytest.mark.skipif(not hasattr(optim, "Muon"), reason="not in this torch")
@pytest.mark.parametrize("shape", [(6, 24), (24, 6)], ids=str)
@pytest.mark.parametrize("how", [None, "match_rms_adamw"])
def test_muon(shape: tuple[int, int], how: str | None):
    """Where all singular values are alike, about what it wins; torch's update has them at 0.7 to 1.2. Else a bound."""
    param = parameter(*shape)
    alike = torch.linalg.qr(torch.randn(24, 6, dtype=torch.float64)).Q
    alike = 3.0 * (alike if shape == (24, 6) else alike.T)
    optimizer, update = stepped(optim.Muon, {"adjust_lr_fn": how, "weight_decay": 0.0}, param, [alike])
    statistic = found(optimizer, param)
    assert statistic.averaged
    rows = (alike * update).sum(1)
    torch.testing.assert_close(descent(statistic).sum(1).double(), rows, rtol=0.4, atol=0.0)
    grad = torch.randn_like(param)
    optimizer, update = stepped(optim.Muon, {"adjust_lr_fn": how, "weight_decay": 0.0}, param, [grad])
    assert 0.7 < float((grad * update).sum() / descent(found(optimizer, param)).sum()) < 1.2


@pytest.mark.parametrize(("kind", "settings"), AVERAGED + SAMPLED[1:], ids=named)
def test_nothing_is_known_before_the_first_step(kind: Any, settings: dict[str, Any]):
    param = parameter(6, 4)
    param.grad = torch.randn_like(param)
    optimizer = kind([param], **{"lr": LR, **settings})
    optimizer.state.clear()  # Adagrad's is there from the start
    assert found(optimizer, param) is None
    assert statistic_of(None, {}, param, 0) is None
    torch.testing.assert_close(descent(gradient_statistic(param)), param.grad.square())


@pytest.mark.parametrize(("kind", "settings"), SAMPLED[1:], ids=named)
def test_without_a_gradient_there_is_no_sample(kind: Any, settings: dict[str, Any]):
    param = parameter(6, 4)
    optimizer, _ = stepped(kind, settings, param, [torch.randn_like(param)])
    param.grad = None
    assert found(optimizer, param) is None and gradient_statistic(param) is None
