"""Warm-up, ages, pins and learning rates: what becomes of a controller's probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import optim

from cacompile.controller import monitor
from cacompile.controller.controller import Controller
from cacompile.state.pins import Pin
from cacompile.state.registry import registry


def masks(controller: Controller, steps: int, optimizer: optim.Optimizer | None = None) -> np.ndarray:
    """[steps, G], the mask after each of some optimizer steps, each followed by a backward that skips what is off."""
    taken = []
    for _ in range(steps):
        controller.advance(optimizer)
        taken.append(controller.column("on").copy())
        for state in controller.params:
            state.skipped[:] |= ~state.on
    return np.array(taken)


def longest_off(on: np.ndarray) -> int:
    longest = run = 0
    for flag in on:
        run = 0 if flag else run + 1
        longest = max(longest, run)
    return longest


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_nothing_is_skipped_in_the_warm_up(warmup: int, make: Any):
    controller = Controller([make(40, 2, warmup_steps=warmup)[1]])
    controller.table.keep[controller.rows] = 0.5
    taken = masks(controller, 20)
    # step n has been done; the mask that it draws is for step n + 1
    assert taken[: max(0, warmup - 1)].all()
    assert not taken[max(0, warmup - 1) :].all(axis=1).any()


def test_a_parameter_that_comes_later_has_its_own_warm_up(make: Any):
    old, new = make(40, 2, name="old", warmup_steps=5)[1], make(40, 2, name="new", warmup_steps=5)[1]
    old.step = 100
    controller = Controller([old, new])
    controller.table.keep[controller.rows] = 0.5
    for _ in range(4):
        controller.advance(None)
        assert new.on.all() and not old.on.all()
    controller.advance(None)
    assert not new.on.all()


@pytest.mark.parametrize("max_age", [1, 3, 20])
@pytest.mark.parametrize("keep", [0.0, 0.1])
def test_no_group_is_off_for_longer_than_max_age(max_age: int, keep: float, make: Any):
    controller = Controller([make(40, 2, name=name, max_age=max_age)[1] for name in "ab"])
    controller.table.keep[controller.rows] = keep
    taken = masks(controller, 100)
    ages = [longest_off(group) for group in taken.T]
    assert max(ages) == max_age if keep == 0.0 else max(ages) <= max_age


def test_a_pinned_parameter_keeps_its_mask_and_the_others_are_drawn(make: Any):
    pinned, drawn = make(8, 2, name="pinned", max_age=2)[1], make(40, 2, name="drawn")[1]
    pinned.pin = Pin(mask=(True, False, False, True))
    controller = Controller([pinned, drawn])
    controller.table.keep[controller.rows] = 0.5
    seen = set()
    for _ in range(10):
        controller.advance(None)
        assert pinned.on.tolist() == [True, False, False, True]
        seen.add(drawn.on.tobytes())
    assert len(seen) == 2  # kept with probability 1/2: every other step


def test_same_seed_same_masks_and_scopes_do_not_draw_alike(make: Any):
    def controller(seed: int, name: str) -> Controller:
        registry.forget()
        made = Controller([make(100, 2, name=name, seed=seed)[1]])
        made.table.keep[made.rows] = 0.5
        return made

    first = masks(controller(1, "a"), 5)
    assert (masks(controller(1, "a"), 5) == first).all()
    assert (masks(controller(2, "a"), 5) != first).any()
    assert (masks(controller(1, "b"), 5) != first).any()


def test_probabilities_follow_from_descent_learning_rate_and_movement(make: Any):
    """A lower rate leaves less loss at stake and moves less; what costs the same within a factor is skipped alike."""
    options = {"slow": (1.0, 1.0), "fast": (10.0, 1.0), "dear": (1.0, 2.0)}
    made = {name: make(40, 2, name=name, monitor_every=3, tolerance=0.5) for name in options}
    params, states = zip(*made.values(), strict=True)
    groups = [{"params": [p], "lr": 1e-3 * rate} for p, (rate, _) in zip(params, options.values())]
    optimizer = optim.SGD(groups)
    for state, (_, cost) in zip(states, options.values()):
        state.flops[:] = 1e6 * cost
    controller = Controller(states)
    for step in range(1, 4):
        for param in params:
            param.grad = torch.ones_like(param)
        controller.look()
        controller.fill(optimizer)
        for group in groups:
            with torch.no_grad():
                group["params"][0].sub_(group["lr"])
        assert (controller.column("keep") == 1.0).all()
        controller.advance(optimizer)
        assert (controller.column("keep") < 1).any() == (step == 3)
    slow, fast, dear = (1 - state.column("keep").mean() for state in states)
    assert 0.0 == fast < slow == dear
    # each block's own size, from samples
    sizes = torch.stack([rows.norm() for rows in (params[0] + 1e-3).detach().split(2)])
    assert states[0].column("update_ratio") == pytest.approx((2e-3 / sizes).numpy(), rel=0.25)


def test_a_group_whose_movement_is_not_known_is_not_skipped(make: Any):
    param, state = make(8, 2, monitor_every=1, tolerance=1.0)
    controller = Controller([state])
    param.grad = torch.ones_like(param)
    controller.advance(optim.SGD([param], lr=1e-3))  # as if its step had not been announced
    assert np.isnan(state.column("update_ratio")).all() and (state.column("keep") == 1.0).all()
    for _ in range(2):  # steps by hand: looked at when the last one is done
        with torch.no_grad():
            param.sub_(1e-3 * param.grad)
        controller.advance(None)
    assert np.isfinite(state.column("update_ratio")).all() and (state.column("keep") < 1.0).all()


def test_what_was_skipped_is_forgotten_once_the_step_is_done(make: Any, backward: Any):
    param, state = make(8, 2)
    state.table.set_on(state.rows, [True, False, False, True])
    backward(state)
    backward(state)
    controller = Controller([state])
    controller.fill(optim.AdamW([param]))
    assert state.skipped.tolist() == [False, True, True, False]
    controller.advance(None)
    assert not state.skipped.any()


def test_dense_steps_leave_what_was_derived_from_the_mask_alone(make: Any):
    controller = Controller([make(8, 2, warmup_steps=3)[1]])
    before = controller.table.mask_version
    masks(controller, 2)
    assert controller.table.mask_version == before
    controller.table.keep[controller.rows] = 0.0
    masks(controller, 1)
    assert controller.table.mask_version > before


def test_a_parameter_that_two_controllers_share_has_one_state(make: Any):
    """Each is made anew after the tables of its parameters were joined with others."""
    states = [make(8, 2, name=name)[1] for name in "abc"]
    first = Controller(states[:2])
    first.table.score[first.rows] = 5.0
    second = Controller(states[1:])
    assert states[1].column("score").tolist() == [5.0] * 4
    second.table.score[second.rows] = 6.0
    assert (states[0].column("score") == 5.0).all() and (states[1].column("score") == 6.0).all()
    assert Controller(states[:2]).column("score").tolist() == [5.0] * 4 + [6.0] * 4


class Copying:
    """In place of a device's event: notes that somebody has waited for the copy."""

    waited = 0

    def synchronize(self) -> None:
        Copying.waited += 1


@pytest.fixture
def slow_device(monkeypatch: pytest.MonkeyPatch) -> type[Copying]:
    """Measurements come to the host as from a GPU: under way when they are read."""
    monkeypatch.setattr(monitor, "fetch", lambda sums: (sums.cpu(), Copying()))
    monkeypatch.setattr(Copying, "waited", 0)
    return Copying


def test_scores_under_way_are_waited_for_one_reading_later(make: Any, slow_device: type[Copying]):
    param, state = make(8, 2, monitor_every=2)
    controller, seen = Controller([state]), []
    for step in range(1, 7):
        param.grad = torch.full_like(param, float(step))
        controller.advance(None)
        seen.append(float(state.column("score")[0]))
    assert np.isnan(seen[:3]).all() and slow_device.waited == 2
    # two rows of two: the measurement of step 2 arrives at step 4, that of step 4, averaged with it, at step 6
    assert seen[3] == 4 * 2.0**2 and seen[5] == (4 * 2.0**2 + 4 * 4.0**2) / 2


def test_scores_under_way_survive_new_scopes_and_saving(make: Any, slow_device: type[Copying]):
    param, state = make(8, 2, monitor_every=2)
    for _ in range(2):
        param.grad = torch.ones_like(param)
        Controller([state]).advance(None)
    saved = state.to_dict()
    state.in_flight = None
    state.load(saved)
    param.grad = None
    for _ in range(2):
        Controller([state]).advance(None)
    assert np.isnan(state.column("score")).all(), "without a new measurement the old one keeps waiting"
    param.grad = torch.ones_like(param)
    for _ in range(2):
        Controller([state]).advance(None)
    assert (state.column("score") == 4.0).all()


def test_scores_of_other_groups_are_not_waited_for(make: Any, slow_device: type[Copying]):
    param, state = make(8, 2, monitor_every=1)
    param.grad = torch.ones_like(param)
    Controller([state]).advance(None)
    other = make(8, 2, block=4)[1]
    other.load(state.to_dict())
    assert state.in_flight is not None and other.in_flight is None
