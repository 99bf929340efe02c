"""The draw: right probabilities, an even spread, the same for the same seed."""

import numpy as np
import pytest

from cacompile.state.draws import draw, generator

DRAWS = 4000


def families(*sizes: int) -> np.ndarray:
    return np.repeat(np.arange(len(sizes)), sizes)


def test_each_group_is_kept_with_its_probability():
    keep = np.array([0.0, 0.1, 0.5, 0.9, 1.0, 0.3, 0.3, 0.3])
    family = families(5, 3)
    mean = np.mean([draw(keep, family, generator(1, i)) for i in range(DRAWS)], axis=0)
    assert np.abs(mean - keep).max() < 5 * 0.5 / DRAWS**0.5
    assert mean[0] == 0.0 and mean[4] == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_counts_are_within_one_of_what_is_expected(seed: int):
    rng = np.random.default_rng(seed)
    family = families(1, 4, 40, 7, 100)
    keep = rng.random(len(family))
    for i in range(200):
        chosen = draw(keep, family, generator(seed, i))
        assert abs(chosen.sum() - keep.sum()) < 1
        for f in range(5):
            assert abs(chosen[family == f].sum() - keep[family == f].sum()) <= 1


def test_sure_groups_are_sure_in_spite_of_rounding():
    rng = np.random.default_rng(0)
    keep = rng.choice([0.0, 1.0, 0.1, 1 / 3], size=3000)
    for i in range(20):
        chosen = draw(keep, np.zeros(3000, int), generator(i))
        assert chosen[keep == 1.0].all() and not chosen[keep == 0.0].any()


def test_members_of_a_family_are_drawn_in_all_combinations():
    pairs = {tuple(np.flatnonzero(draw(np.full(4, 0.5), np.zeros(4, int), generator(0, i)))) for i in range(200)}
    assert len(pairs) == 6  # always two of four, and any two


def test_a_draw_is_a_function_of_its_seed_and_counters():
    keep, family = np.full(64, 0.5), np.zeros(64, int)
    again = [draw(keep, family, generator(3, step)) for step in (1, 1, 2)]
    other = draw(keep, family, generator(4, 1))
    assert (again[0] == again[1]).all()
    assert (again[0] != again[2]).any() and (again[0] != other).any()


def test_nothing_to_draw():
    assert draw(np.zeros(0), np.zeros(0, int), generator(0)).shape == (0,)
