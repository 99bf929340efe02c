"""The tolerance is spent where it saves most, and never exceeded."""

import numpy as np
import pytest

from cacompile.config import Config
from cacompile.runtime.policy import keep_probabilities


def random_groups(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    groups = int(rng.integers(1, 200))
    descent = np.exp(rng.normal(size=groups) * 3)
    settled = rng.random(groups) if seed % 3 else np.ones(groups)
    return descent, settled, rng.integers(1, 10, groups) * 1e6


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("tolerance", [0.01, 0.3, 0.8, 1.0])
def test_budget_and_caps_are_respected_and_all_below_their_cap_give_up_the_same(seed: int, tolerance: float):
    descent, settled, flops = random_groups(seed)
    config = Config(tolerance=tolerance, max_skip=0.8)
    skip = 1.0 - keep_probabilities(descent, settled, flops, config)
    cap = config.max_skip * settled
    assert (skip >= 0).all() and (skip <= cap + 1e-12).all()
    given_up, budget = (skip * descent).sum(), tolerance * descent.sum()
    assert given_up <= budget * (1 + 1e-9)
    below = skip < cap - 1e-9
    if below.any():  # then the budget is what stops: it is spent whole, at one price
        assert given_up == pytest.approx(budget)
        price = (skip * descent / flops)[below]
        assert price == pytest.approx(price[0])
        # the others met their cap, because they are cheaper
        assert (cap * descent / flops)[~below].max(initial=0.0) <= price[0] * (1 + 1e-9)


def test_a_small_case_by_hand():
    # budget 0.25 * 8 = 2 = 0.6 + 0.6 + 0.8: the third, twice as dear in FLOPs, meets its cap of 0.8; u = 0.6
    keep = keep_probabilities(np.array([4.0, 3.0, 1.0]), np.ones(3), np.array([1.0, 1.0, 2.0]), Config(tolerance=0.25))
    assert keep == pytest.approx([1 - 0.6 / 4, 1 - 0.6 / 3, 0.2])


def test_more_tolerance_never_keeps_more():
    descent, settled, flops = random_groups(4)
    keeps = [keep_probabilities(descent, settled, flops, Config(tolerance=t)) for t in np.linspace(0, 1, 21)]
    assert (np.diff(keeps, axis=0) <= 1e-12).all()


def test_tolerance_zero_skips_nothing():
    assert (keep_probabilities(*random_groups(5), Config(tolerance=0.0)) == 1.0).all()


def test_groups_that_are_not_known_or_save_nothing_are_kept_and_change_nothing_for_the_others():
    descent, settled, flops = random_groups(7)
    alone = keep_probabilities(descent, settled, flops, Config())
    more = [np.append(descent, [np.nan, 1e-9]), np.append(settled, [1.0, 1.0]), np.append(flops, [1e6, 0.0])]
    keep = keep_probabilities(*more, Config())
    assert (keep[-2:] == 1.0).all()
    assert keep[:-2] == pytest.approx(alone)
    assert (keep_probabilities(np.full(3, np.nan), np.ones(3), np.ones(3), Config()) == 1.0).all()


def test_groups_that_win_nothing_are_skipped_to_their_cap():
    keep = keep_probabilities(np.array([0.0, 1.0]), np.array([1.0, 0.0]), np.ones(2), Config(max_skip=0.7))
    assert keep == pytest.approx([0.3, 1.0])
    assert keep_probabilities(np.zeros(2), np.ones(2), np.ones(2), Config(max_skip=1.0)) == pytest.approx([0.0, 0.0])


def test_a_budget_that_is_all_there_is_to_give():
    """Rounding must not push the search past the end where tolerance and caps meet."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        descent, flops = rng.random(50), rng.random(50)
        keep = keep_probabilities(descent, np.ones(50), flops, Config(tolerance=0.7, max_skip=0.7))
        assert keep == pytest.approx(np.full(50, 0.3))
