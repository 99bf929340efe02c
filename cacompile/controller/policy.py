"""How often each group is computed: as long as a FLOP saved is worth more than the descent that it costs."""

from __future__ import annotations

import numpy as np

from cacompile.config import Config

from .spikes import EARLY, JUMP, totals, was_spike

NOISE = 0.01
"""Share of its expected descent that a group gives up when it is computed in every second step, however slowly it
moves: half as many gradients tell half as much."""

FAST = 0.013
"""Movement in one step, as a share of a group's own size, at which skipping every second step gives up all descent."""

STEP = 3.0
"""FLOPs of a whole step for each of dW: forward pass, input gradient and weight gradient cost the same."""

MARGIN = 2.0
"""How many times its price in descent a saved FLOP must be worth: all this is measured roughly (`docs/policy.md`)."""

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
    descent: np.ndarray, ratio: np.ndarray, flops: np.ndarray, mean_descents: np.ndarray, config: Config
) -> np.ndarray:
    """How often each group is computed, float [G] in 0..1: 1/k for every k-th step.

    A group computed in every k-th step saves (1 - 1/k) * flops and gives up loss * k (k - 1) / 2 * descent, with
    loss = NOISE + (ratio / FAST)^3: its estimate is up to k - 1 steps old. A shorter run with its schedule shrunk
    would give up usual steps, not this one, each for the FLOPs of a whole step. That is the price which a skipped
    FLOP has to beat, MARGIN times; it is beaten up to some k for each group. Where all of them together would give up
    more than `tolerance` of what a step usually wins, the price rises until they do not. 1 - 1/k is never above
    max_skip.

    descent: float [G] >= 0, expected loss decrease per step, NaN where not known yet (never skipped);
    ratio: float [G], movement in a step over its size, NaN where not known yet (never skipped);
    flops: float [G], of dW (0: never skipped, it saves nothing);
    mean_descents: float [G], expected loss decrease that steps have had so far, see `mean_descent`.
    """
    keep = np.ones(len(descent))
    known = np.isfinite(descent) & np.isfinite(ratio) & (flops > 0.0)
    # where nothing at all is won, as at a learning rate of zero, there is nothing to go by
    if config.tolerance == 0.0 or not descent[known].sum() > 0.0 or not mean_descents[known].sum() > 0.0:
        return keep
    descent, flops, step = descent[known], flops[known], mean_descents[known].sum()
    loss = (NOISE + (ratio[known] / FAST) ** 3) * descent
    longest = 1.0 / (1.0 - min(config.max_skip, 1.0 - 1e-6))
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        worth = step * flops / (STEP * MARGIN * flops.sum() * loss)

    def every(price: float) -> np.ndarray:
        return np.minimum(longest, _distance(worth / price))

    def fits(price: float) -> bool:
        k = every(price)
        return bool((loss * k * (k - 1.0) / 2.0).sum() <= config.tolerance * step)

    price = 1.0
    if not fits(price):
        low, high = 0.0, 64.0  # of the binary logarithm of the price: too cheap, dear enough
        for _ in range(32):
            middle = (low + high) / 2.0
            low, high = (low, middle) if fits(2.0**middle) else (middle, high)
        price = 2.0**high
    keep[known] = 1.0 / every(price)
    return keep


def _distance(worth: np.ndarray) -> np.ndarray:
    """k >= 1 where one more FLOP saved costs just its worth: 1 / k^2 times that is (2 k - 1) / 2."""
    x = np.minimum(2.0 * worth, 1e18)
    k = 1.0 + np.cbrt(x / 2.0)  # never below the solution of k^2 (2 k - 1) = x, to which Newton's steps come down
    for _ in range(6):
        k -= (k * k * (2.0 * k - 1.0) - x) / (6.0 * k * k - 2.0 * k)
    return np.maximum(k, 1.0)
