"""A FLOP is saved where it is worth more than it costs; the tolerance is never exceeded."""

from typing import Any

import numpy as np
import pytest

from cacompile.config import Config
from cacompile.controller import policy
from cacompile.controller.policy import FAST, MARGIN, NOISE, STEP, keep_probabilities, mean_descent

Groups = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def random_groups(seed: int) -> Groups:
    rng = np.random.default_rng(seed)
    groups = int(rng.integers(1, 200))
    descent = np.exp(rng.normal(size=groups) * 3)
    return descent, rng.random(groups) * FAST, rng.integers(1, 10, groups) * 1e6, descent * rng.uniform(0.5, 4.0)


def of(value: Any, groups: int) -> np.ndarray:
    return np.full(groups, float(value))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("tolerance", [0.001, 0.01, 0.05, 1.0])
def test_budget_and_caps_hold_and_all_below_their_cap_pay_the_same_price(seed: int, tolerance: float):
    descent, speed, flops, usual = random_groups(seed)
    config = Config(tolerance=tolerance, max_skip=0.8)
    every = 1.0 / keep_probabilities(descent, speed, flops, usual, config)
    assert (every >= 1.0).all() and (1.0 - 1.0 / every <= config.max_skip + 1e-9).all()
    loss = (NOISE + (speed / FAST) ** 3) * descent
    given_up, budget = (loss * every * (every - 1.0) / 2.0).sum(), tolerance * usual.sum()
    assert given_up <= budget * (1.0 + 1e-9)
    below = (every > 1.0 + 1e-6) & (1.0 - 1.0 / every < config.max_skip - 1e-6)
    if below.any():
        price = (loss * (2.0 * every - 1.0) / 2.0 / (flops / every**2))[below]
        assert price == pytest.approx(price[0], rel=1e-4)
        own = usual.sum() / (STEP * MARGIN * flops.sum())
        assert price[0] <= own * (1.0 + 1e-4)
        if given_up < budget * (1.0 - 1e-4):  # then it is the price that stops
            assert price[0] == pytest.approx(own, rel=1e-4)


def test_a_small_case_by_hand():
    # two groups alike: k^2 (2 k - 1) = 2 / (STEP MARGIN loss) = 4.5 at k = 3/2
    loss = 2.0 / (STEP * MARGIN * 4.5)
    speed = of(FAST * (loss - NOISE) ** (1 / 3), 2)
    keep = keep_probabilities(of(7.0, 2), speed, of(1e6, 2), of(7.0, 2), Config(tolerance=1.0))
    assert keep == pytest.approx([2 / 3, 2 / 3])


def test_slower_cheaper_and_less_needed_groups_are_skipped_more():
    one = np.ones(3)
    for rising in (
        keep_probabilities(one, np.array([0.1, 0.3, 0.5]) * FAST, one, one, Config(tolerance=1.0)),
        keep_probabilities(np.array([1.0, 2.0, 4.0]), 0.1 * FAST * one, one, one, Config(tolerance=1.0)),
        keep_probabilities(one, 0.1 * FAST * one, np.array([4.0, 2.0, 1.0]), one, Config(tolerance=1.0)),
    ):
        assert (np.diff(rising) > 0.0).all()


def test_what_moves_fast_is_not_skipped_even_if_all_may_be_given_up():
    keep = keep_probabilities(np.ones(4), of(FAST, 4), np.ones(4), np.ones(4), Config(tolerance=1.0, max_skip=1.0))
    assert (keep == 1.0).all()


def test_late_in_a_schedule_more_is_skipped_and_nothing_when_the_loss_jumps():
    """What counts is what a step usually wins: a shorter run gives up usual steps."""
    usual, speed, flops = np.ones(4), of(0.5 * FAST, 4), np.ones(4)
    keep = [keep_probabilities(of(now, 4), speed, flops, usual, Config()).mean() for now in (0.1, 0.5, 1.0, 2.0, 50.0)]
    assert (np.diff(keep) >= 0.0).all() and keep[0] < 0.5 < keep[2] and keep[-1] == 1.0


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
    keep = keep_probabilities(np.array([0.0, 1.0]), of(FAST, 2), np.ones(2), np.ones(2), Config(max_skip=0.7))
    assert keep == pytest.approx([0.3, 1.0])
    # at a learning rate of zero nothing is won by anybody: that tells nothing
    assert (keep_probabilities(np.zeros(2), np.zeros(2), np.ones(2), np.ones(2), Config(max_skip=1.0)) == 1.0).all()


def test_no_number_is_too_large_or_too_small():
    extremes = np.array([0.0, 1e-300, 1e-30, 1.0, 1e30])
    for speed in (0.0, 1e-9, 1.0, np.inf):
        keep = keep_probabilities(extremes, of(speed, 5), of(1e15, 5), extremes, Config())
        assert np.isfinite(keep).all() and (keep > 0.0).all() and (keep <= 1.0).all()


def test_the_distance_solves_its_equation():
    worth = 10.0 ** np.linspace(-3, 15, 200)
    k = policy._distance(worth)
    assert (k >= 1.0).all()
    inside = k > 1.0
    assert (k * k * (2 * k - 1) / 2)[inside] == pytest.approx(worth[inside], rel=1e-6)
