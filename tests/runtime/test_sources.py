"""Expected descent is what a step wins of the loss, per unit of learning rate, as the optimizer really steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn, optim

from cacompile.runtime.monitor import settings_by_param
from cacompile.runtime.sources import descent, gradient_of, source_of

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
    return source_of(optimizer, settings_by_param(optimizer)[id(param)], param, STEPS)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize(("kind", "settings"), AVERAGED + SAMPLED, ids=named)
@pytest.mark.parametrize("shape", [(6, 4), (5,)], ids=str)
def test_of_gradients_that_are_always_the_same(kind: Any, settings: dict[str, Any], shape: Any):
    """Then the expected gradient is known, and so is the update."""
    param = parameter(*shape)
    grad = torch.randn_like(param)
    optimizer, update = stepped(kind, settings, param, [grad])
    source = found(optimizer, param)
    averaged = (kind, settings) in AVERAGED
    assert averaged == (source is not None and source.averaged)
    torch.testing.assert_close(descent(source or gradient_of(param)), grad * update, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize(("kind", "averaged"), [(optim.RAdam, True), (optim.RMSprop, False)], ids=named)
def test_of_gradients_that_vary(kind: Any, averaged: bool):
    """RAdam: but for a factor that all elements share. RMSprop: centered, so it has a mean of gradients."""
    param = parameter(6, 4)
    grad = torch.randn_like(param)
    settings = {"centered": True} if kind is optim.RMSprop else {}
    optimizer, update = stepped(kind, settings, param, [1.5 * grad, 0.5 * grad])
    source = found(optimizer, param)
    ratio = descent(source) / (grad * update)
    assert source.averaged == averaged
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=0.02, atol=0.0)
    assert kind is optim.RAdam or float(ratio.mean()) == pytest.approx(1.0, rel=0.1)


@pytest.mark.skipif(not hasattr(optim, "Muon"), reason="not in this torch")
@pytest.mark.parametrize("shape", [(6, 24), (24, 6)], ids=str)
@pytest.mark.parametrize("how", [None, "match_rms_adamw"])
def test_muon(shape: tuple[int, int], how: str | None):
    """Where all singular values are alike, about what it wins; torch's update has them at 0.7 to 1.2. Else a bound."""
    param = parameter(*shape)
    alike = torch.linalg.qr(torch.randn(24, 6, dtype=torch.float64)).Q
    alike = 3.0 * (alike if shape == (24, 6) else alike.T)
    optimizer, update = stepped(optim.Muon, {"adjust_lr_fn": how, "weight_decay": 0.0}, param, [alike])
    source = found(optimizer, param)
    assert source.averaged
    rows = (alike * update).sum(1)
    torch.testing.assert_close(descent(source).sum(1).double(), rows, rtol=0.4, atol=0.0)
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
    assert source_of(None, {}, param, 0) is None
    torch.testing.assert_close(descent(gradient_of(param)), param.grad.square())


@pytest.mark.parametrize(("kind", "settings"), SAMPLED[1:], ids=named)
def test_without_a_gradient_there_is_no_sample(kind: Any, settings: dict[str, Any]):
    param = parameter(6, 4)
    optimizer, _ = stepped(kind, settings, param, [torch.randn_like(param)])
    param.grad = None
    assert found(optimizer, param) is None and gradient_of(param) is None
