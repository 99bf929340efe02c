"""Weights and optimizer states of every dtype: skipped with the right estimate, or dense with a reason; never noise."""

from __future__ import annotations

import itertools
import logging
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim

import cacompile
from cacompile.controller.estimate import fill, weights
from cacompile.controller.monitor import learn, measure

OPTIONS = {"block_rows": 16, "warmup_steps": 2, "monitor_every": 2, "tolerance": 1.0, "inner": "aot_eager"}
REAL = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class Weight(nn.Module):
    """One weight of some dtype beside a usual one, multiplied in a dtype that can be."""

    def __init__(self, dtype: torch.dtype, compute: torch.dtype, *, trained: bool = True) -> None:
        super().__init__()
        values = torch.randn(256, 32) / 6
        self.weight = nn.Parameter((values * (1 if dtype.is_floating_point else 9)).to(dtype), requires_grad=trained)
        self.usual = nn.Parameter(torch.randn(256, 32) / 6)
        self.compute = compute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = x.to(self.compute) @ self.weight.to(self.compute).t()
        return own.abs().float() + x @ self.usual.t()


def train(model: nn.Module, optimizer: optim.Optimizer, steps: int = 12) -> None:
    run = torch.compile(model, backend="convaware", options=OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module="torch.jit")
        for _ in range(steps):
            run(torch.randn(16, 32)).square().mean().backward()
            optimizer.step()
            model.zero_grad()


def fates(model: nn.Module) -> dict[str, str]:
    return {row.param: row.fate for row in cacompile.explain(model).rows}


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, *FLOAT8])
def test_weights_that_nobody_can_judge_stay_dense_beside_others(dtype: torch.dtype, caplog: pytest.LogCaptureFixture):
    model = Weight(dtype, dtype if dtype.is_complex else torch.float32)
    trained = list(model.parameters()) if dtype.is_complex else [model.usual]  # torch has no step for float8
    train(model, optim.SGD(trained, lr=1e-6, momentum=0.9))
    name = str(dtype).removeprefix("torch.")
    assert fates(model) == {"weight": f"dense: {name}, of which no descent can be measured", "usual": "masked_mm"}
    view = cacompile.session(model)
    (binding,) = view.bindings
    assert dict(binding.layout.flops_by_param)["weight"] > 0
    assert view.params["usual"].column("keep").max() < 1.0 and view.flops[1] > 0
    assert not [entry for entry in caplog.records if entry.levelno >= logging.WARNING]
    view.pin(keep=0.0)
    run = torch.compile(model, backend="convaware", options=OPTIONS)
    model.zero_grad()
    run(torch.randn(16, 32)).square().mean().backward()
    assert not model.usual.grad.any() and model.weight.grad.to(torch.complex64).abs().sum() > 0


@pytest.mark.parametrize("dtype", REAL)
def test_real_weights_are_skipped(dtype: torch.dtype, caplog: pytest.LogCaptureFixture):
    model = Weight(dtype, dtype)
    train(model, optim.SGD(model.parameters(), lr=1e-6, momentum=0.9))
    assert fates(model) == {"weight": "masked_mm", "usual": "masked_mm"}
    weight = cacompile.session(model).params["weight"]
    assert weight.column("keep").max() < 1.0 and (weight.column("score") > 0.0).all()
    assert not [entry for entry in caplog.records if entry.levelno >= logging.WARNING]


def test_quantised_weights_are_frozen_and_disturb_nothing():
    model = Weight(torch.int8, torch.float32, trained=False)
    train(model, optim.SGD([model.usual], lr=1e-6, momentum=0.9))
    assert fates(model) == {"usual": "masked_mm"} and cacompile.session(model).flops[1] > 0


MEANS = {optim.AdamW: "exp_avg", optim.SGD: "momentum_buffer"}


def made(make: Any, dtype: torch.dtype, kept: torch.dtype, kind: type, size: float) -> Any:
    """A parameter, its state and its optimizer, whose statistics are of another dtype; gradients of about `size`."""
    param, state = make(8, 6, dtype=dtype)
    optimizer = kind([param], **({"momentum": 0.9} if kind is optim.SGD else {"eps": 1e-8}))
    moments = {MEANS[kind]: (torch.rand(8, 6) + 0.5) * size, "exp_avg_sq": (torch.rand(8, 6) + 0.5) * size**2}
    optimizer.state[param] = {name: value.to(kept) for name, value in moments.items()} | {"step": torch.tensor(1e9)}
    param.grad = torch.randn_like(param)
    return param, state, optimizer


@pytest.mark.parametrize("kind", MEANS)
@pytest.mark.parametrize(("dtype", "kept"), itertools.product(REAL, REAL))
def test_estimates_and_scores_of_statistics_in_any_dtype(
    dtype: torch.dtype, kept: torch.dtype, kind: type, make: Any, caplog: pytest.LogCaptureFixture
):
    size = 0.004  # whose square float16 still has
    param, state, optimizer = made(make, dtype, kept, kind, size)
    settings = optimizer.param_groups[0]
    mean, square = (optimizer.state[param][name].double().numpy() for name in (MEANS[kind], "exp_avg_sq"))
    for each, scores in measure([state], optimizer, {}):
        learn(each, scores)
    expected = mean**2 * 0.1 if kind is optim.SGD else mean**2 / (np.sqrt(square) + 1e-8)
    assert state.column("score") == pytest.approx(expected.reshape(4, -1).sum(1), rel=1e-5)
    state.skipped[:] = [True, False, True, False]
    before = param.grad.clone()
    fill(optimizer, settings, state, weights(state.skipped, state.age))
    estimate = torch.from_numpy(mean * (0.1 if kind is optim.SGD else 1.0)).to(dtype)
    off = [0, 1, 4, 5]
    torch.testing.assert_close(param.grad[off], estimate[off], rtol=2 * torch.finfo(kept).eps, atol=1e-7)
    assert torch.equal(param.grad[[2, 3, 6, 7]], before[[2, 3, 6, 7]])
    assert not caplog.records


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (optim.SGD, {"momentum": 0.9}),
        (optim.SGD, {}),
        (optim.Adam, {}),
        (optim.Adamax, {}),
        (optim.RMSprop, {"momentum": 0.9}),
        (optim.RMSprop, {}),
        (optim.Adagrad, {}),
        (optim.Adafactor, {"eps": (1e-7, 1e-3)}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_small_gradients_are_not_lost_in_half_precision(
    dtype: torch.dtype, kind: Any, settings: dict[str, Any], make: Any
):
    """Read from what the optimizer keeps in half precision, as exactly as from the same numbers in float32."""
    scores = []
    for copied in (torch.float32, dtype):
        torch.manual_seed(0)
        param, state = make(8, 6, dtype=copied)
        optimizer = kind([param], lr=1e-3, **settings)
        param.grad = torch.ones_like(param)
        optimizer.step()
        for value in optimizer.state[param].values():
            if isinstance(value, torch.Tensor) and value.dim():
                value.copy_((torch.rand(value.shape) * 1e-3 + 1e-3).half().bfloat16())
        param.grad = (torch.rand(8, 6) * 1e-5 + 1e-5).half().bfloat16().to(copied)
        with torch.no_grad():
            param.copy_(param.half().bfloat16())
        for each, found in measure([state], optimizer, {}):
            learn(each, found)
        scores.append(state.column("score").copy())
    assert (scores[0] > 0.0).all() and scores[1] == pytest.approx(scores[0], rel=0.02)


@pytest.mark.parametrize("kept", FLOAT8)
@pytest.mark.parametrize("kind", MEANS)
def test_states_of_eight_bits_are_not_read_without_their_scale(
    kept: torch.dtype, kind: type, make: Any, caplog: pytest.LogCaptureFixture
):
    param, state, optimizer = made(make, torch.float32, kept, kind, 1.0)
    state.skipped[:] = True
    fill(optimizer, optimizer.param_groups[0], state, weights(state.skipped, state.age))
    assert not param.grad.any()
    param.grad = torch.randn_like(param)
    state.skipped[:] = False
    for each, scores in measure([state], optimizer, {}):
        learn(each, scores)
    assert state.column("score") == pytest.approx(
        param.grad.double().numpy().reshape(4, -1).__pow__(2).sum(1), rel=1e-5
    )
    for entry in caplog.records:
        assert "not as expected" in entry.getMessage() and "its scale is not known" in str(entry.exc_info[1])
