"""Convergence correlations: how far the scores of groups of one family, and of families of one kind, move together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cacompile.state.history import History

FEWEST = 5
"""Measurements below which a correlation says nothing."""


@dataclass(frozen=True, slots=True)
class Correlation:
    """Means over pairs of Pearson's r of log descents, measurement by measurement; NaN where there is no pair."""

    kind: str
    within: float
    """Between groups of one family."""
    layers: float
    """Between families of one kind, which are in other layers."""
    within_apart: float
    layers_apart: float
    """The same after the mean of all groups is taken off, which falls with the learning rate."""
    measurements: int


def correlations(history: History) -> list[Correlation]:
    """One for each kind that has pairs; empty below FEWEST measurements in which all its groups were known.

    Source: of convergence correlation as a thing to use, the abstract of "Convergence-Aware Neural Network Training"
    (DAC 2020); what is computed here is ours.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = np.log(history.descent.astype(float))
    scores[~np.isfinite(scores)] = np.nan
    kinds = np.array(history.kinds, object)[history.family] if len(history.family) else np.zeros(0, object)
    found = []
    for kind in dict.fromkeys(history.kinds):
        own, family = scores[:, kinds == kind], history.family[kinds == kind]
        own = own[np.isfinite(own).all(1)]
        known = scores[np.isfinite(scores).all(1)]
        if len(own) < FEWEST:
            continue
        values = [_of(own, family)]
        values.append(_of(own - known.mean(1, keepdims=True), family) if len(known) == len(own) else (np.nan, np.nan))
        if np.isfinite(values).any():
            (within, layers), (within_apart, layers_apart) = values
            found.append(Correlation(kind, within, layers, within_apart, layers_apart, len(own)))
    return found


def _of(scores: np.ndarray, family: np.ndarray) -> tuple[float, float]:
    """(within families, between their means). scores: float [measurements, groups]."""
    members = [scores[:, family == each] for each in np.unique(family)]
    pairs = np.array([each.shape[1] * (each.shape[1] - 1) / 2 for each in members])
    within = [mean_correlation(each) if n else 0.0 for each, n in zip(members, pairs)]
    mean = float(np.average(within, weights=pairs)) if pairs.any() else np.nan
    return mean, mean_correlation(np.stack([each.mean(1) for each in members], 1))


def mean_correlation(columns: np.ndarray) -> float:
    """Pearson's r, mean over all pairs of columns, -1 to 1; NaN for fewer than two that change. float [P, columns]."""
    spread = columns.std(0)
    columns = columns[:, spread > 1e-12]
    n = columns.shape[1]
    if n < 2:
        return float("nan")
    standard = (columns - columns.mean(0)) / columns.std(0)
    return float((standard.sum(1).var() - 1.0 * n) / (n * (n - 1)))
