"""One gradient gone wrong at a measurement, and rolled back: it opens the gate neither then nor later."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import optim

from cacompile.controller.controller import Controller
from cacompile.controller.monitor import learn, measure
from cacompile.controller.movement import moved
from cacompile.controller.policy import mean_descent
from cacompile.controller.spikes import EARLY, JUMP, believed_ratio
from cacompile.state.registry import registry

pytestmark = pytest.mark.usefixtures("followed")

EVERY = 10

MAKE: dict[str, Callable[..., optim.Optimizer]] = {
    "adamw": lambda params: optim.AdamW(params, lr=5e-4),
    "momentum": lambda params: optim.SGD(params, lr=5e-5, momentum=0.9),
    "sgd": lambda params: optim.SGD(params, lr=5e-4),
    "adagrad": lambda params: optim.Adagrad(params, lr=2.5e-3),
}


def trained(make: Any, kind: str, steps: int, spikes: tuple[int, ...] = (), scale: float = 1e4) -> np.ndarray:
    """Share of the blocks that each step skips, [steps]; after a spike weights and optimizer are rolled back."""
    torch.manual_seed(0)
    registry.forget()
    options = {"warmup_steps": EVERY, "monitor_every": EVERY, "block": 4, "tolerance": 0.2}
    params, states = zip(*(make(64, 32, name=name, **options) for name in "ab"), strict=True)
    optimizer, shares = MAKE[kind](params), []
    for step in range(1, steps + 1):
        for param, state in zip(params, states):
            off = ~state.on
            param.grad = param.detach() + torch.randn_like(param)
            param.grad[np.repeat(off, 4)] = 0.0
            state.skipped[:] = off
        shares.append(np.mean([state.skipped for state in states]))
        kept = copy.deepcopy((params, optimizer.state_dict())) if step in spikes else None
        if kept:
            for param in params:
                param.grad.mul_(scale)
        optimizer.step()
        if kept:
            optimizer.load_state_dict(kept[1])
            with torch.no_grad():
                for param, before in zip(params, kept[0]):
                    param.copy_(before)
    return np.array(shares)


@pytest.mark.parametrize("scale", [1e4, torch.inf, torch.nan])
@pytest.mark.parametrize("kind", MAKE)
def test_a_spike_closes_the_gate_until_the_next_measurement_at_most(kind: str, scale: float, make: Any):
    steps = 10 * EVERY
    usual = trained(make, kind, steps + 100 + EVERY)
    assert 0.1 < usual[steps:].mean() < 0.78, "neither shut nor as open as max_skip lets it"
    share = trained(make, kind, steps + 100 + EVERY, (steps,), scale)
    assert (share[:steps] == usual[:steps]).all()
    until, later = slice(steps, steps + EVERY), slice(steps + EVERY, None)
    assert share[until].mean() <= usual[until].mean() + 0.02
    assert share[later].mean() == pytest.approx(usual[later].mean(), abs=0.02)


@pytest.mark.parametrize("spikes", [(1,), (2,), (3,), (1, 2), (2, 3)])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_spikes_among_the_first_measurements_are_forgotten(kind: str, spikes: tuple[int, ...], make: Any):
    steps = spikes[-1] * EVERY
    usual, share = (trained(make, kind, steps + 100 + EVERY, each) for each in ((), tuple(EVERY * n for n in spikes)))
    assert share[steps + EVERY :].mean() == pytest.approx(usual[steps + EVERY :].mean(), abs=0.02)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_of_two_spikes_in_a_row_a_little_is_remembered(kind: str, make: Any):
    steps = 10 * EVERY
    usual = trained(make, kind, steps + 100 + EVERY)
    share = trained(make, kind, steps + 100 + EVERY, (steps - EVERY, steps))
    assert share[steps : steps + EVERY].mean() <= usual[steps : steps + EVERY].mean() + 0.02
    assert share[steps + EVERY :].mean() == pytest.approx(usual[steps + EVERY :].mean(), abs=0.06)


Descents = list[float]


def followed(descents: Descents, groups: int = 3) -> Descents:
    """The running mean, as a share of the first descent's size, after each of some measurements."""
    sizes = np.arange(1.0, groups + 1)
    mean, last, means = np.full(groups, np.nan), np.full(groups, np.nan), []
    for number, descent in enumerate(descents, 1):
        mean = mean_descent(mean, descent * sizes, np.full(groups, float(number)), last)
        last = descent * sizes if np.isfinite(descent) else last
        means.append(float(mean.sum() / sizes.sum()))
    return means


@pytest.mark.parametrize("at", range(2, 30))
@pytest.mark.parametrize("size", [JUMP * 1.01, 1e4, 1e30])
def test_nothing_of_a_lone_jump_is_taken(at: int, size: float):
    assert followed([1.0] * (at - 1) + [size] + [1.0] * 9) == pytest.approx([1.0] * (at + 9))


@pytest.mark.parametrize("at", range(2, 30))
def test_a_second_jump_in_a_row_counts_jump_times_or_is_forgotten(at: int):
    means = followed([1.0] * (at - 1) + [1e4, 1e4] + [1.0] * 9)
    if at + 1 >= EARLY:
        assert max(means) <= 1.0 + 2.0 * (JUMP - 1.0) / (at + 1) + 1e-9
    assert means[at + 1] < JUMP and means[-1] < 1.5


@pytest.mark.parametrize("after", [3, 30])
@pytest.mark.parametrize("size", [10.0, 100.0])
def test_what_stays_high_becomes_usual(size: float, after: int):
    means = followed([1.0] * after + [size] * (3 * after))
    assert means[-1] > size / 2


@pytest.mark.parametrize(
    "descents", [[1.0, 3.9, 1.4, 0.4, 0.5, 0.2], [5.0, 1.3, 0.4, 0.12, 0.04, 0.011], [0.1, 0.39, 1.5, 5.5, 20.0, 70.0]]
)
def test_what_rises_and_falls_by_less_than_jumps_is_an_ordinary_mean(descents: Descents):
    expected = [np.average(descents[:n], weights=np.arange(n) if n > 1 else [1.0]) for n in range(1, len(descents) + 1)]
    assert followed(descents) == pytest.approx(expected)


def test_a_measurement_that_is_missing_counts_nothing():
    assert followed([1.0, np.nan, np.nan, 2.0])[:3] == [1.0, 1.0, 1.0]


def test_a_group_that_slows_down_at_once_is_believed_when_it_stays_slow():
    now, last = np.array([0.1, 0.3, 0.1, np.nan, 0.1, 5.0]), np.array([1.0, 1.0, np.nan, 1.0, np.inf, 0.1])
    believed = believed_ratio(now, last, spike=False)
    np.testing.assert_array_equal(believed, [1.0, 0.3, 0.1, np.nan, 0.1, 5.0])
    np.testing.assert_array_equal(believed_ratio(now, now, spike=False), now)
    np.testing.assert_array_equal(believed_ratio(now, last, spike=True), now)


def test_one_step_that_clipping_holds_back_does_not_open_the_gate(make: Any):
    """Another parameter's gradient explodes: in this step all others hardly move."""
    param, state = make(64, 16, monitor_every=1, block=16)
    controller, optimizer = Controller([state]), optim.SGD([param], lr=1e-2)
    keeps = []
    for step in range(1, 9):
        controller.look()
        param.grad = 0.4 * param.detach() * (1e-4 if step == 6 else 1.0)
        with torch.no_grad():
            param.sub_(0.01 * param.grad)
        controller.advance(optimizer)
        keeps.append(state.column("keep").mean())
    # its own small descent is averaged with the one before
    assert keeps[5] > 0.8 * keeps[4] and keeps[-1] == pytest.approx(keeps[4], rel=0.05)


def test_a_movement_that_is_not_finite_is_not_known():
    before, now = torch.ones(3, 64), torch.ones(3, 64)
    now[0, 3], now[1, 3] = torch.inf, torch.nan
    np.testing.assert_array_equal(moved(before, now).numpy(), [np.nan, np.nan, 0.0])


def test_scores_of_single_gradients_are_not_averaged_with_a_spike(make: Any):
    param, state = make(8, 3, monitor_every=1)
    optimizer, seen = optim.SGD([param], lr=1.0), []
    state.step = 10
    state.column("mean_descent")[:] = 6.0
    for size in (1.0, 1.0, 1e4, 1.0, 3.0**0.5):
        param.grad = torch.full_like(param, size)
        for each, scores in measure([state], optimizer, {}):
            learn(each, scores)
        seen.append(float(state.column("score")[0]))
    assert seen == pytest.approx([6.0, 6.0, (6e8 + 6.0) / 2, 6.0, 12.0], rel=1e-5)
