"""Scores are the expected descent, whatever the optimizer keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim

from cacompile.runtime.monitor import SMOOTHING, learn, read_scores

SIZE = 9


def read(records: list[Any], optimizer: optim.Optimizer | None) -> None:
    for record, scores in read_scores(records, optimizer, {}):
        assert scores.event is None
        learn(record, scores)


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
    param, record = make(SIZE, SIZE, dim=dim, dtype=dtype)
    optimizer = optim.AdamW([param], betas=(0.8, 0.98), eps=1e-3, fused=fused)
    mean, square = np.zeros((SIZE, SIZE)), np.zeros((SIZE, SIZE))
    for grad in train(optimizer, param, steps):
        mean, square = 0.8 * mean + 0.2 * grad, 0.98 * square + 0.02 * grad**2
    read([record], optimizer)
    mean, square = mean / (1 - 0.8**steps), square / (1 - 0.98**steps)
    expected = by_group(mean**2 / (np.sqrt(square) + 1e-3), dim)
    assert record.state.score == pytest.approx(expected, rel=1e-4 if dtype == torch.float32 else 0.05)


def test_sgd_with_momentum(make: Any):
    param, record = make(SIZE, 3)
    optimizer = optim.SGD([param], lr=0.1, momentum=0.9)
    train(optimizer, param, 5)
    read([record], optimizer)
    update = optimizer.state[param]["momentum_buffer"].double().numpy()
    assert record.state.score == pytest.approx(by_group(0.1 * update * update, 0), rel=1e-5)


def test_own_statistics_average_what_was_computed(make: Any):
    param, record = make(SIZE, 3)
    optimizer = optim.SGD([param], lr=0.1)
    first = by_group(train(optimizer, param, 1)[-1] ** 2, 0)
    read([record], optimizer)
    assert record.state.score == pytest.approx(first, rel=1e-5)
    second = by_group(train(optimizer, param, 1)[-1] ** 2, 0)
    record.skipped[:] = skipped = np.array([True, False, True, False, False])
    read([record], optimizer)
    expected = np.where(skipped, first, SMOOTHING * second + (1 - SMOOTHING) * first)
    assert record.state.score == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("value", [0.0, None, torch.inf, torch.nan])
def test_a_gradient_that_says_nothing_is_not_learned(value: float | None, make: Any):
    """An output that is not used gives zeros, an overflow under a scaler inf."""
    param, record = make(SIZE, 3)
    optimizer = optim.SGD([param], lr=0.1)
    train(optimizer, param, 1)
    read([record], optimizer)
    before = record.state.score.copy()
    param.grad = None if value is None else torch.full_like(param, value)
    read([record], optimizer)
    assert (record.state.score == before).all()


def test_nothing_is_known_before_the_first_gradient(make: Any):
    param, record = make(SIZE, 3)
    read([record], optim.AdamW([param]))
    assert np.isnan(record.state.score).all()


def test_a_hand_written_optimizer_is_read_from_its_gradients(make: Any):
    param, record = make(SIZE, 3)
    param.grad = torch.randn_like(param)
    read([record], None)
    assert record.state.score == pytest.approx(by_group(param.grad.double().numpy() ** 2, 0), rel=1e-5)


def test_the_state_of_an_unknown_optimizer_is_not_read(make: Any):
    class Adammy(optim.Optimizer):
        pass

    param, record = make(SIZE, 3)
    optimizer = Adammy([param], {})
    optimizer.state[param].update(exp_avg=torch.ones_like(param), exp_avg_sq=torch.ones_like(param), step=1)
    param.grad = torch.randn_like(param)
    read([record], optimizer)
    assert record.state.score == pytest.approx(by_group(param.grad.double().numpy() ** 2, 0), rel=1e-5)


def test_a_state_that_cannot_be_read_gives_own_statistics_and_one_warning(make: Any, caplog: pytest.LogCaptureFixture):
    class OddAdam(optim.Adam):
        pass

    param, record = make(SIZE, 3)
    optimizer = OddAdam([param])
    optimizer.state[param].update(exp_avg=torch.ones_like(param), exp_avg_sq=torch.ones_like(param), step="third")
    param.grad = torch.randn_like(param)
    for _ in range(3):
        read([record], optimizer)
        assert record.state.score == pytest.approx(by_group(param.grad.double().numpy() ** 2, 0), rel=1e-5)
    (said,) = (entry for entry in caplog.records if "OddAdam" in entry.getMessage())
    assert "gradients of one step" in said.getMessage() and said.exc_info is not None


def test_several_parameters_keep_their_own_scores(make: Any):
    pairs = [make(4, 3, name="a"), make(7, 2, name="b"), make(3, 2, name="no gradient")]
    for param, _ in pairs[:2]:
        param.grad = torch.randn_like(param)
    read([record for _, record in pairs], None)
    for param, record in pairs[:2]:
        assert record.state.score == pytest.approx(by_group(param.grad.double().numpy() ** 2, 0), rel=1e-5)
    assert np.isnan(pairs[2][1].state.score).all()


def test_speeds_come_along_and_what_is_not_seen_keeps_its_own(make: Any):
    (near, seen), (far, unseen) = make(4, 3, name="seen"), make(6, 3, name="unseen")
    near.grad, far.grad = torch.ones_like(near), torch.ones_like(far)
    unseen.state.speed[:] = [1.0, 2.0, 3.0]
    for record, scores in read_scores([seen, unseen], None, {id(seen): torch.tensor([0.5, 0.25])}):
        learn(record, scores)
    assert seen.state.speed.tolist() == [0.5, 0.25] and unseen.state.speed.tolist() == [1.0, 2.0, 3.0]
