"""How often each group is computed: as long as a FLOP saved is worth more than the descent that it costs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cacompile.config import Config

from .spikes import EARLY, JUMP, totals, was_spike

NOISE = 0.01
"""Share of its descent that a group gives up when it is computed in every second step, however slowly it moves."""

FAST = 0.006
"""Movement in one step, as a share of a group's own size, at which skipping every second step gives up all descent."""

ALIKE = 2.0
"""Groups whose descent per FLOP is within this factor of the median share one distance from turn to turn."""

STEP = 3.0
"""FLOPs of a whole step for each of dW where they have not been counted: forward pass, dX and dW cost the same."""

MARGIN = 6.0
"""How many times its price in descent a saved FLOP must be worth at the default `tolerance`: all this is measured
roughly (`docs/policy.md`). Less where the option is higher, in proportion."""

LEAST = 0.2
"""Share of all dW that must be worth skipping for any of it to be: a masked backward that leaves out less takes as long
as the dense one."""

USUAL_TOLERANCE = Config().tolerance

USUAL = 2.0
"""The n-th measurement counts n - 1 times in what a step usually wins, for which it has this over n as its weight."""


def mean_descent(
    mean: np.ndarray, descent: np.ndarray, measurements: np.ndarray, last: np.ndarray | None = None
) -> np.ndarray:
    """The running mean of a group's descent after one more measurement, float [G]; late ones count more, NaN nothing.

    Where all groups together jump up, nothing is taken of it; if they had jumped at the last measurement too, JUMP
    times what is usual, or all of it among the first few. If those come down from a jump, it is forgotten.

    mean: float [G], so far, NaN before the first; measurements: float [G], how many it is of then;
    last: float [G], what was measured before, NaN where nothing was; None: nothing anywhere.
    """
    last = np.full(len(mean), np.nan) if last is None else last
    weight = np.minimum(1.0, USUAL / np.maximum(measurements, 1.0))
    then, now, usual = totals(mean, descent, last)
    again = then > JUMP * usual
    if now > JUMP * usual > 0.0 and (again or now > JUMP * then):
        as_it_is = np.isnan(mean) | np.isnan(descent) | (again & (measurements < EARLY))
        descent = np.where(as_it_is, descent, mean * (JUMP if again else 1.0))
    elif was_spike(mean, descent, last, early=True):
        weight = np.where(measurements <= EARLY, 1.0, weight)
    mixed = np.where(np.isnan(mean), descent, mean + weight * (descent - mean))
    return np.where(np.isnan(descent), mean, mixed)


def keep_probabilities(
    descent: np.ndarray,
    ratio: np.ndarray,
    flops: np.ndarray,
    mean_descents: np.ndarray,
    config: Config,
    turns: np.ndarray | None = None,
    step_flops: float | None = None,
    least: float = LEAST,
) -> np.ndarray:
    """How often each group is computed, float [G] in 0..1: 1/k for every k-th step.

    A group computed in every k-th step saves (1 - 1/k) * flops and gives up `loss(k, ratio)` of its descent. A shorter
    run would give up the descent of a step for the FLOPs of a whole step, forward pass and dX too. That is the price
    which a skipped FLOP has to beat, MARGIN times; it is beaten up to some k, and by no k where a group moves fast.
    Groups that score alike share it, and move as their mean does: what one of them misses in a step the others learn
    from the same samples. What is dearer than that is computed in every step and left out of the price, what is cheaper
    has a k of its own. A jump of the descent counts as what is usual. Where all of them together would give up more
    than `tolerance` of what a step wins, the price rises until they do not. 1 - 1/k is never above max_skip, and k
    never above `turns`: while a group is skipped others of its role learn, so what has none like it never is. With a
    `budget` the price is the one, the same for all, at which it is saved; it ends neither by the price nor by
    `tolerance`, only by a jump.

    descent: float [G] >= 0, expected loss decrease per step, NaN where not known yet (never skipped);
    ratio: float [G], movement in a step over its size, NaN where not known yet (never skipped);
    flops: float [G], of dW (0: never skipped, it saves nothing);
    mean_descents: float [G], expected loss decrease that steps have had so far, see `mean_descent`;
    turns: int [G], of its role, see `GroupIndex.turns`; None: as many as one likes;
    step_flops: of a whole step, much more than of dW where a frozen base makes that a small part; None: STEP times it;
    least: share of dW FLOPs below which nothing is skipped, unless a `budget` is given.
    """
    keep = np.ones(len(descent))
    dw = max(1.0, flops.sum())
    whole = STEP * flops.sum() if step_flops is None else step_flops
    of_step = whole / dw
    longest = np.full(len(descent), 1.0 / (1.0 - min(config.max_skip, 1.0 - 1e-6)))
    if turns is not None:
        longest = np.minimum(longest, turns)
    known = np.isfinite(descent) & np.isfinite(ratio) & (flops > 0.0) & (longest > 1.0)
    # where nothing at all is won, as at a learning rate of zero, there is nothing to go by
    if not (config.tolerance or config.budget) or not min(descent[known].sum(), mean_descents[known].sum()) > 0.0:
        return keep
    descent, ratio, flops, usual = descent[known], ratio[known], flops[known], mean_descents[known]
    won = descent.sum()
    dearness = _over_median(descent / flops, flops)
    dear, alike = dearness > ALIKE, (dearness <= ALIKE) & (dearness >= 1.0 / ALIKE)
    step = min(usual[~dear].sum(), descent[~dear].sum())
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        if alike.any():
            descent = np.where(alike, flops * (descent[alike].sum() / flops[alike].sum()), descent)
            ratio = np.where(alike, np.average(ratio[alike], weights=flops[alike]), ratio)
        worth = np.where(dear, 0.0, step * flops / (of_step * margin(config) * flops[~dear].sum() * descent))

    def every(price: float) -> np.ndarray:
        return _distance(worth / price, ratio, longest[known])

    def saved(k: np.ndarray) -> float:
        return float((flops * (1.0 - 1.0 / k)).sum())

    def fits(price: float) -> bool:
        k = every(price)
        if config.budget:
            return saved(k) <= config.budget * whole
        lost = np.where(k > 1.0, descent * loss(k, ratio), 0.0)
        return bool(lost.sum() <= config.tolerance * step)

    if config.budget and won > JUMP * usual.sum():
        return keep
    price = _dear_enough(fits, -64.0 if config.budget else 0.0)
    k = every(price)
    if config.budget or saved(k) >= least * dw:
        keep[known] = 1.0 / k
    return keep


def margin(config: Config) -> float:
    """How many times its price a saved FLOP must be worth to who has set these options."""
    return MARGIN * min(1.0, USUAL_TOLERANCE / max(config.tolerance, 1e-9))


def _dear_enough(fits: Callable[[float], bool], low: float) -> float:
    """The lowest price that fits, about: the higher the better. low: binary logarithm of the lowest to be asked for."""
    if fits(2.0**low):
        return 2.0**low
    high = 64.0
    for _ in range(32):
        middle = (low + high) / 2.0
        low, high = (low, middle) if fits(2.0**middle) else (middle, high)
    return 2.0**high


def loss(k: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    """Share of its descent that a group gives up when it is computed in every k-th step, float [G].

    k (k - 1) / 2 times NOISE, and what the weights have moved in the k - 1 steps for which an estimate stands in, over
    FAST.
    """
    return NOISE * k * (k - 1.0) / 2.0 + (k - 1.0) * ratio / FAST


def _over_median(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Values over the weighted median of those that are not zero, which a few large ones do not move."""
    some = values > 0.0
    order = np.argsort(values[some], kind="stable")
    passed = np.cumsum(weights[some][order])
    return values / values[some][order][np.searchsorted(passed, passed[-1] / 2.0)]


def _distance(worth: np.ndarray, ratio: np.ndarray, longest: np.ndarray) -> np.ndarray:
    """1 <= k <= longest where one more FLOP saved costs just its worth: worth / k^2 is the slope of `loss`."""
    low, high = np.ones(len(worth)), longest
    with np.errstate(over="ignore", invalid="ignore"):

        def pays(k: np.ndarray) -> np.ndarray:
            return worth > k * k * (NOISE * (2.0 * k - 1.0) / 2.0 + ratio / FAST)

        if not pays(low).any():  # as most of the time
            return low
        for _ in range(40):
            middle = (low + high) / 2.0
            more = pays(middle)
            low, high = np.where(more, middle, low), np.where(more, high, middle)
        return np.where(pays(high), high, low)
