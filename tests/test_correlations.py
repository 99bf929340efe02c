"""Correlations of scores: against numpy's, of what is made to move together or not."""

from dataclasses import replace

import numpy as np
import pytest

from cacompile.report.correlations import FEWEST, correlations, mean_correlation
from cacompile.state.history import History


def history(descent: np.ndarray, family: list[int], kinds: list[str]) -> History:
    names = [f"{i}" for i in range(len(kinds))]
    return replace(
        History.empty(), descent=descent.astype(np.float32), family=np.array(family), kinds=kinds, families=names
    )


@pytest.mark.parametrize("seed", range(5))
def test_mean_of_all_pairs(seed: int):
    columns = np.random.default_rng(seed).normal(size=(12, 7)) @ np.random.default_rng(seed + 9).normal(size=(7, 7))
    pairs = np.corrcoef(columns.T)[np.triu_indices(7, 1)]
    assert mean_correlation(columns) == pytest.approx(pairs.mean())
    assert np.isnan(mean_correlation(columns[:, :1])) and np.isnan(mean_correlation(np.ones((5, 3))))


def test_families_move_together_or_not():
    """Two layers of neurons, each with a course of its own that its three groups follow, and one lonely head."""
    rng = np.random.default_rng(0)
    courses = rng.normal(size=(40, 2))
    noise = 0.05 * rng.normal(size=(40, 7))
    scores = np.exp(np.concatenate([courses[:, [0, 0, 0, 1, 1, 1]], rng.normal(size=(40, 1))], 1) + noise)
    (neurons,) = correlations(history(scores, [0, 0, 0, 1, 1, 1, 2], ["neurons", "neurons", "heads"]))
    assert neurons.kind == "neurons" and neurons.measurements == 40
    assert neurons.within > 0.95 and abs(neurons.layers) < 0.4
    falling = scores * np.exp(-np.arange(40.0))[:, None]
    (shared,) = correlations(history(falling, [0, 0, 0, 1, 1, 1, 2], ["neurons", "neurons", "heads"]))
    assert shared.layers > 0.95, "what all share, as a falling learning rate"
    assert shared.layers_apart == pytest.approx(neurons.layers_apart, abs=1e-3)


def test_what_is_not_known_says_nothing():
    scores = np.ones((FEWEST - 1, 2))
    assert correlations(history(scores, [0, 0], ["rows"])) == []
    unread = np.full((9, 2), np.nan)
    assert correlations(history(unread, [0, 0], ["rows"])) == []
    assert correlations(History.empty()) == []
