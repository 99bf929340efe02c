"""A FLOP is saved where it is worth more than it costs; the tolerance is never exceeded."""

from typing import Any

import numpy as np
import pytest

from cacompile.config import Config
from cacompile.controller import policy
from cacompile.controller.policy import (
    ALIKE,
    FAST,
    LEAST,
    MARGIN,
    NOISE,
    STEP,
    keep_probabilities,
    loss,
    margin,
    mean_descent,
)

Groups = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

SLOW = 0.1 * FAST
"""Slow enough for what is cheap to be skipped, and only for that."""


def random_groups(seed: int) -> Groups:
    rng = np.random.default_rng(seed)
    groups = int(rng.integers(1, 200))
    descent = np.exp(rng.normal(size=groups) * 3)
    return descent, rng.random(groups) * FAST / 9, rng.integers(1, 10, groups) * 1e6, descent * rng.uniform(1.0, 4.0)


def of(value: Any, groups: int) -> np.ndarray:
    return np.full(groups, float(value))


def slope(k: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    """Of the loss."""
    return (loss(k + 1e-6, ratio) - loss(k - 1e-6, ratio)) / 2e-6


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("tolerance", [0.001, 0.01, 0.05, 1.0])
def test_budget_and_caps_hold_and_all_below_their_cap_pay_the_same_price(seed: int, tolerance: float):
    descent, speed, flops, usual = random_groups(seed)
    config = Config(tolerance=tolerance, max_skip=0.8)
    every = 1.0 / keep_probabilities(descent, speed, flops, usual, config)
    assert (every >= 1.0).all() and (1.0 - 1.0 / every <= config.max_skip + 1e-9).all()
    order = np.argsort(descent / flops)
    middle = order[np.cumsum(flops[order]) >= flops.sum() / 2][0]
    dearness = descent / flops * flops[middle] / descent[middle]
    dear, alike = dearness > ALIKE, (dearness <= ALIKE) & (dearness >= 1.0 / ALIKE)
    step = min(usual[~dear].sum(), descent[~dear].sum())
    assert (every[dear] == 1.0).all() and np.ptp(every[alike]) < 1e-6
    # those that are alike count as their mean does
    descent[alike] = flops[alike] * descent[alike].sum() / flops[alike].sum()
    speed[alike] = np.average(speed[alike], weights=flops[alike])
    given_up, budget = (descent * loss(every, speed))[every > 1.0].sum(), tolerance * step
    assert given_up <= budget * (1.0 + 1e-6)
    below = (every > 1.0 + 1e-3) & (1.0 - 1.0 / every < config.max_skip - 1e-6)
    if below.any():
        paid = (descent * slope(every, speed) / (flops / every**2))[below]
        own = step / (STEP * margin(config) * flops[~dear].sum())
        assert paid.max() <= paid.min() * (1.0 + 1e-3)  # one price does for all
        assert paid.max() <= own * (1.0 + 1e-3)
        if given_up < budget * (1.0 - 1e-4):  # then it is the price that stops
            assert paid.min() >= own * (1.0 - 1e-3)


def test_a_small_case_by_hand():
    # the cheap ones win a tenth, all together 0.64: for one k more 6.4 / (STEP MARGIN k^2) = 0.356 / k^2 is won, 0.0395
    # at k = 3, and NOISE (2 k - 1) / 2 is lost, 0.025 there; at k = 3.46 they are equal
    descent = np.array([7.0, 7.0, 7.0, 0.7, 0.7])
    price = descent.mean() / 7.0
    keep = keep_probabilities(descent, of(0.0, 5), of(1e6, 5), descent, Config(max_skip=0.9))
    k = 1.0 / keep[3]
    assert keep[3] == keep[4] and k == pytest.approx(3.46, abs=0.01)
    assert 10.0 * price / (STEP * MARGIN) == pytest.approx(k**2 * NOISE * (2.0 * k - 1.0) / 2.0)
    found = loss(np.array([2.0, 3.0]), np.array([FAST, 0.0]))
    assert found == pytest.approx([NOISE + 1.0, 3.0 * NOISE])


def test_what_moves_slowly_is_skipped_even_if_it_wins_as_much_as_others():
    flops = np.array([1.0, 2.0, 3.0, 4.0])
    descent = flops * np.array([1.9, 1.0, 0.6, 1.0])
    keep = [keep_probabilities(descent, of(speed, 4), flops, descent, Config()) for speed in (0.0, 0.01 * FAST, FAST)]
    assert (np.ptp(keep, axis=1) < 1e-9).all() and 0.5 < keep[0][0] < keep[1][0] < keep[2][0] == 1.0
    assert (keep_probabilities(descent, of(0.0, 4), flops, descent, Config(tolerance=0.5)) < 0.5).all(), "if wished"


def test_what_moves_fast_is_computed_however_little_steps_win():
    """Of a schedule that ends at a rate of nothing the last steps are the cheapest to do without."""
    flops, usual = np.ones(8), np.ones(8)
    for share in (1.2, 0.5, 0.05):
        keep = keep_probabilities(share * usual, of(SLOW, 8), flops, usual, Config())
        assert (keep == 1.0).all()
        assert (keep_probabilities(share * usual, of(0.0, 8), flops, usual, Config()) < 0.6).all()
    new = np.array([*np.zeros(7), 1.0])  # of the others nothing is known of before
    with np.errstate(all="raise"):
        assert (keep_probabilities(np.array([*usual[:7], 9.0]), of(FAST, 8), flops, new, Config()) == 1.0).all()


def test_too_little_is_not_worth_a_masked_backward():
    """Unless a budget is given."""
    slow = of(0.6 * SLOW, 8)
    for share in (0.5, 2.4):
        flops = np.array([*np.ones(6), *of(3.0 * share * LEAST / (1.0 - share * LEAST), 2)])
        descent = cheap(8) * flops
        keep = keep_probabilities(descent, slow, flops, descent, Config())
        assert (keep[-1] == 1.0) == (share < 1.0) and (keep[:6] == 1.0).all()
    flops[-2:] = 0.1
    descent = cheap(8) * flops
    assert keep_probabilities(descent, slow, flops, descent, Config()).min() == 1.0
    assert keep_probabilities(descent, slow, flops, descent, Config(budget=0.01)).min() < 1.0


def cheap(groups: int) -> np.ndarray:
    """Descents of groups of which the last quarter wins little."""
    return np.repeat([1.0, 0.1], [groups - groups // 4, groups // 4])


def test_what_scores_alike_shares_a_turn_what_is_dear_is_kept_what_is_cheap_is_skipped():
    flops, speed = np.ones(7), of(SLOW, 7)
    descent = np.array([1.0, 1.3, 0.7, 1.0, 20.0, 0.1, 0.05])
    keep = keep_probabilities(descent, speed, flops, descent, Config(), least=0.0)
    assert (keep[:5] == 1.0).all() and 1.0 > keep[5] > keep[6]
    rest = np.delete(np.arange(7), 4)  # what is dear changes nothing for the others
    alone = keep_probabilities(descent[rest], speed[rest], flops[rest], descent[rest], Config(), least=0.0)
    assert alone == pytest.approx(keep[rest])
    shared = keep_probabilities(descent, speed, flops, descent, Config(budget=0.2))
    assert (shared[:4] == shared[0]).all() and shared[0] < 1.0


def test_slower_and_less_needed_groups_are_skipped_more():
    speeds = [
        keep_probabilities(cheap(4), of(v * FAST, 4), np.ones(4), cheap(4), Config(), least=0.0)[-1]
        for v in (0.01, 0.1, 0.2, 0.3)
    ]
    assert (np.diff(speeds) > 0.0).all() and speeds[-1] < 1.0 and speeds[0] < 0.3, speeds
    apart = np.array([0.02, 0.2, 3.0])
    config = Config(max_skip=0.99)
    keep = keep_probabilities(apart, of(SLOW, 3), np.array([1.0, 1.0, 3.0]), apart, config, least=0.0)
    assert (np.diff(keep) > 0.0).all() and keep[0] > 0.01


def test_what_moves_fast_is_not_skipped_even_if_all_may_be_given_up():
    config = Config(tolerance=1.0, max_skip=1.0)
    keep = keep_probabilities(cheap(4), of(10 * FAST, 4), np.ones(4), cheap(4), config)
    assert (keep > 0.9).all()
    assert (keep_probabilities(cheap(4), of(np.inf, 4), np.ones(4), cheap(4), config) == 1.0).all()


def test_late_in_a_schedule_no_more_is_skipped_of_what_stands_still_and_nothing_when_the_loss_jumps():
    """A small step at the end of a schedule is worth as much as it wins: fresh gradients average its noise out."""
    usual, speed, flops = cheap(4), of(0.0, 4), np.ones(4)
    keep = [keep_probabilities(now * usual, speed, flops, usual, Config())[-1] for now in (0.01, 0.5, 1.0, 2.0, 99.0)]
    assert keep[0] == keep[1] == keep[2] < 0.3 and (np.diff(keep[2:]) > 0.0).all() and keep[-1] > 0.98


def test_usual_descent_by_hand():
    usual = np.full(3, np.nan)
    for number, descent in enumerate(([8.0, np.nan, 1.0], [2.0, 5.0, np.nan], [5.0, 5.0, 4.0], [5.0, 3.0, np.nan]), 1):
        usual = mean_descent(usual, np.array(descent), np.full(3, number))
    # weights of measurements 1 to 4: 0, 1, 2, 3; what comes later starts with its first
    assert usual == pytest.approx([(1 * 2 + 2 * 5 + 3 * 5) / 6, 0.5 * 5 + 0.5 * 3, 1 + 2 / 3 * 3])


def test_more_tolerance_never_keeps_more():
    groups = random_groups(4)
    keeps = [keep_probabilities(*groups, Config(tolerance=t)) for t in np.linspace(0, 0.1, 21)]
    assert (np.diff(keeps, axis=0) <= 1e-7).all()


def test_tolerance_zero_skips_nothing():
    assert (keep_probabilities(*random_groups(5), Config(tolerance=0.0)) == 1.0).all()


@pytest.mark.parametrize("unknown", ["descent", "speed", "flops"])
def test_groups_that_are_not_known_or_save_nothing_are_kept_and_change_nothing_for_the_others(unknown: str):
    groups = dict(zip(("descent", "speed", "flops", "usual"), random_groups(7), strict=True))
    alone = keep_probabilities(*groups.values(), Config())
    more = {name: np.append(values, values.mean()) for name, values in groups.items()}
    more[unknown][-1] = 0.0 if unknown == "flops" else np.nan
    keep = keep_probabilities(*more.values(), Config())
    assert keep[-1] == 1.0 and keep[:-1] == pytest.approx(alone)
    more[unknown][:] = more[unknown][-1]
    assert (keep_probabilities(*more.values(), Config()) == 1.0).all()


def test_groups_that_win_nothing_are_skipped_to_their_cap():
    keep = keep_probabilities(np.array([0.0, 1.0]), of(SLOW, 2), np.ones(2), np.ones(2), Config(max_skip=0.7))
    assert keep[0] == pytest.approx(0.3) and keep[1] == 1.0
    # at a learning rate of zero nothing is won by anybody: that tells nothing
    assert (keep_probabilities(np.zeros(2), np.zeros(2), np.ones(2), np.ones(2), Config(max_skip=1.0)) == 1.0).all()


def test_no_number_is_too_large_or_too_small():
    extremes = np.array([0.0, 1e-300, 1e-30, 1.0, 1e30])
    for speed in (0.0, 1e-9, 1.0, np.inf):
        keep = keep_probabilities(extremes, of(speed, 5), of(1e15, 5), extremes, Config())
        assert np.isfinite(keep).all() and (keep > 0.0).all() and (keep <= 1.0).all()


def test_the_distance_solves_its_equation():
    worth, ratio = (
        each.ravel() for each in np.meshgrid(10.0 ** np.linspace(-3, 6, 50), np.linspace(0.0, 2.0, 9) * FAST)
    )
    k = policy._distance(worth, ratio, 50.0)
    assert (k >= 1.0).all() and (k <= 50.0).all()
    inside = (k > 1.001) & (k < 49.9)
    assert (k * k * slope(k, ratio))[inside] == pytest.approx(worth[inside], rel=1e-3)


def test_where_dw_is_a_small_part_of_the_step_little_is_gained_and_nothing_skipped():
    one = of(1.0, 4)
    full, half, adapters = (
        keep_probabilities(cheap(4), SLOW * one, one, cheap(4), Config(), step_flops=each * 4, least=0.0)[-1]
        for each in (3.0, 4.0, 70.0)
    )
    assert full < half < adapters == 1.0


def test_in_every_step_one_of_each_role_is_computed():
    one, turns = of(1.0, 16), np.array([9] * 12 + [1, 2, 3, 9])
    keep, many = (
        keep_probabilities(cheap(16), of(0.0, 16), one, cheap(16), Config(), each)[12:] for each in (turns, None)
    )
    assert (keep >= 1.0 / turns[12:]).all() and keep[0] == 1.0 and (keep[1:] < 1.0).all()
    assert (many < 0.5).all() and keep[1] == 0.5


@pytest.mark.parametrize("budget", [0.02, 0.1, 0.25])
@pytest.mark.parametrize("speed", [0.0, 0.5, 3.0])
def test_a_budget_is_saved_where_it_costs_least(budget: float, speed: float):
    """Whatever the price and `tolerance` say, of the whole step; a jump of the descent still computes all."""
    rng = np.random.default_rng(0)
    descent, flops = rng.uniform(1.0, 2.0, 40), rng.uniform(1.0, 2.0, 40)
    moved = of(speed * FAST, 40)
    config = Config(budget=budget, tolerance=0.0)
    keep = keep_probabilities(descent, moved, flops, descent, config)
    assert (flops * (1.0 - keep)).sum() / (3.0 * flops.sum()) == pytest.approx(budget, rel=1e-3)
    assert (keep_probabilities(99.0 * descent, moved, flops, descent, config) == 1.0).all()
    scarce = keep_probabilities(descent, moved, flops, descent, config, step_flops=1e6)
    assert (scarce >= 1.0 - config.max_skip - 1e-9).all() and scarce.min() < 0.3, "best effort where dW is little"
    most = keep_probabilities(descent, moved, flops, descent, Config(budget=1.0))
    assert most == pytest.approx(0.2)
