"""Measurement are the expected descent, whatever the optimizer keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim

from cacompile.controller.monitor import SMOOTHING, learn, measure

SIZE = 9


def read(states: list[Any], optimizer: optim.Optimizer | None) -> None:
    for state, scores in measure(states, optimizer, {}):
        assert scores.event is None
        learn(state, scores)


def by_group(values: np.ndarray, dim: int) -> np.ndarray:
    """Sums over blocks of two rows along `dim`."""
    by_row = values.sum(axis=tuple(d for d in range(values.ndim) if d != dim))
    return np.array([by_row[i : i + 2].sum() for i in range(0, len(by_row), 2)])


def train(optimizer: optim.Optimizer, param: nn.Parameter, steps: int) -> list[np.ndarray]:
    grads = []
    for _ in range(steps):
        param.grad = torch.randn_like(param) * 0.1
        grads.append(param.grad.double().numpy().copy())
        optimizer.step()
    return grads


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adam(steps: int, dim: int, fused: bool, dtype: torch.dtype, make: Any):
    """Against the gradients themselves, in float64: the corrected moments of Adam as in its paper."""
    param, state = make(SIZE, SIZE, dim=dim, dtype=dtype)
    optimizer = optim.AdamW([param], betas=(0.8, 0.98), eps=1e-3, fused=fused)
    mean, square = np.zeros((SIZE, SIZE)), np.zeros((SIZE, SIZE))
    for grad in train(optimizer, param, steps):
        mean, square = 0.8 * mean + 0.2 * grad, 0.98 * square + 0.02 * grad**2
    read([state], optimizer)
    mean, square = mean / (1 - 0.8**steps), square / (1 - 0.98**steps)
    expected = by_group(mean**2 / (np.sqrt(square) + 1e-3), dim)
    assert state.column("score") == pytest.approx(expected, rel=1e-4 if dtype == torch.float32 else 0.05)


def test_sgd_with_momentum(make: Any):
    param, state = make(SIZE, 3)
    optimizer = optim.SGD([param], lr=0.1, momentum=0.9)
    train(optimizer, param, 5)
    read([state], optimizer)
    update = optimizer.state[param]["momentum_buffer"].double().numpy()
    assert state.column("score") == pytest.approx(by_group(0.1 * update * update, 0), rel=1e-5)


def test_own_statistics_average_what_was_computed(make: Any):
    param, state = make(SIZE, 3)
    optimizer = optim.SGD([param], lr=0.1)
    first = by_group(train(optimizer, param, 1)[-1] ** 2, 0)
    read([state], optimizer)
    assert state.column("score") == pytest.approx(first, rel=1e-5)
    second = by_group(train(optimizer, param, 1)[-1] ** 2, 0)
    state.skipped[:] = skipped = np.array([True, False, True, False, False])
    read([state], optimizer)
    expected = np.where(skipped, first, SMOOTHING * second + (1 - SMOOTHING) * first)
    assert state.column("score") == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("value", [0.0, None, torch.inf, torch.nan])
def test_a_gradient_that_says_nothing_is_not_learned(value: float | None, make: Any):
    """An output that is not used gives zeros, an overflow under a scaler inf."""
    param, state = make(SIZE, 3)
    optimizer = optim.SGD([param], lr=0.1)
    train(optimizer, param, 1)
    read([state], optimizer)
    before = state.column("score").copy()
    param.grad = None if value is None else torch.full_like(param, value)
    read([state], optimizer)
    assert (state.column("score") == before).all()


def test_nothing_is_known_before_the_first_gradient(make: Any):
    param, state = make(SIZE, 3)
    read([state], optim.AdamW([param]))
    assert np.isnan(state.column("score")).all()


def test_a_hand_written_optimizer_is_read_from_its_gradients(make: Any):
    param, state = make(SIZE, 3)
    param.grad = torch.randn_like(param)
    read([state], None)
    assert state.column("score") == pytest.approx(by_group(param.grad.double().numpy() ** 2, 0), rel=1e-5)


def test_the_state_of_an_unknown_optimizer_is_not_read(make: Any):
    class Adammy(optim.Optimizer):
        pass

    param, state = make(SIZE, 3)
    optimizer = Adammy([param], {})
    optimizer.state[param].update(exp_avg=torch.ones_like(param), exp_avg_sq=torch.ones_like(param), step=1)
    param.grad = torch.randn_like(param)
    read([state], optimizer)
    assert state.column("score") == pytest.approx(by_group(param.grad.double().numpy() ** 2, 0), rel=1e-5)


def test_a_state_that_cannot_be_read_gives_own_statistics_and_one_warning(make: Any, caplog: pytest.LogCaptureFixture):
    class OddAdam(optim.Adam):
        pass

    param, state = make(SIZE, 3)
    optimizer = OddAdam([param])
    optimizer.state[param].update(exp_avg=torch.ones_like(param), exp_avg_sq=torch.ones_like(param), step="third")
    param.grad = torch.randn_like(param)
    for _ in range(3):
        read([state], optimizer)
        assert state.column("score") == pytest.approx(by_group(param.grad.double().numpy() ** 2, 0), rel=1e-5)
    (said,) = (entry for entry in caplog.records if "OddAdam" in entry.getMessage())
    assert "gradients of one step" in said.getMessage() and said.exc_info is not None


def test_several_parameters_keep_their_own_scores(make: Any):
    pairs = [make(4, 3, name="a"), make(7, 2, name="b"), make(3, 2, name="no gradient")]
    for param, _ in pairs[:2]:
        param.grad = torch.randn_like(param)
    read([state for _, state in pairs], None)
    for param, state in pairs[:2]:
        assert state.column("score") == pytest.approx(by_group(param.grad.double().numpy() ** 2, 0), rel=1e-5)
    assert np.isnan(pairs[2][1].column("score")).all()


def test_speeds_come_along_and_what_is_not_seen_keeps_its_own(make: Any):
    (near, seen), (far, unseen) = make(4, 3, name="seen"), make(6, 3, name="unseen")
    near.grad, far.grad = torch.ones_like(near), torch.ones_like(far)
    unseen.column("update_ratio")[:] = [1.0, 2.0, 3.0]
    for state, scores in measure([seen, unseen], None, {id(seen): torch.tensor([0.5, 0.25])}):
        learn(state, scores)
    assert seen.column("update_ratio").tolist() == [0.5, 0.25] and unseen.column("update_ratio").tolist() == [
        1.0,
        2.0,
        3.0,
    ]
