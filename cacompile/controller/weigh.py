"""What the policy is given of each group, and why it has one of them computed in every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from cacompile.config import Config
from cacompile.state.groups import GroupIndex
from cacompile.state.params import ParamState

from .policy import LEAST, USUAL_TOLERANCE, keep_probabilities
from .spikes import JUMP

UNREAD = "no score yet"
SMALL = "too small, costs no dW FLOPs of its own"
NOTHING_WON = "nothing is won by a step, as at a learning rate of zero"
JUMPED = "wins far more than usual just now"
ENOUGH = "the option budget is saved without it"
NO_ROOM = "the option tolerance leaves no room for it"
FAST = "still moves fast"
SMALL_PART = "dW is too small a part of a step"
ALONE = "no other group does the same in this layer or in others, to learn what it would miss"
LITTLE = "too little in all is worth skipping for a masked backward to pay"
DEAR = "wins more for its FLOPs than others"

SELDOM = 0.99
"""What is computed in more of the steps than that counts as never skipped."""


class Weighed(NamedTuple):
    """What `policy.keep_probabilities` is given."""

    descent: np.ndarray
    """float [groups]: expected loss decrease of a step, NaN where not known."""
    ratio: np.ndarray
    """float [groups]: movement in a step over size, mean over FLOPs, NaN where not known."""
    flops: np.ndarray
    """float [groups]: of dW."""
    usual: np.ndarray
    """float [groups]: expected loss decrease that steps have had so far."""
    turns: np.ndarray
    """int [groups]: of its role, see `GroupIndex.turns`."""
    step_flops: float | None = None
    """FLOPs of a whole step; None where they have not been counted."""

    def keep(self, config: Config, least: float = LEAST) -> np.ndarray:
        """How often the policy has each group computed, float [groups]."""
        return keep_probabilities(*self[:4], config, self.turns, self.step_flops, least)


def step_flops(params: Sequence[ParamState]) -> float | None:
    """FLOPs of a whole step of all graphs, of what has been counted of these parameters; None where nothing has."""
    dw, whole = sum(int(param.counted.sum()) for param in params), sum(param.step_counted for param in params)
    return float(sum(param.flops.sum() for param in params)) * whole / dw if dw and whole else None


def weigh(
    index: GroupIndex,
    descent: np.ndarray,
    movement: np.ndarray,
    flops: np.ndarray,
    usual: np.ndarray,
    fixed: np.ndarray,
    step_flops: float | None = None,
) -> Weighed:
    """Groups' values from those of their blocks, each [blocks].

    fixed: bool, what is frozen or always kept: it wins nothing and costs nothing, not to be weighed against others;
    step_flops: of a whole step, see above.
    """
    descent, flops = (np.where(fixed, 0.0, each) for each in (descent, flops))
    # what costs nothing need not be known, nor what has had no gradient yet while the rest of its group has
    known = np.isfinite(descent)
    some = index.sum(known & (flops > 0.0))[index.of_block] > 0.0
    descent = np.where(~known & ((flops == 0.0) | some), 0.0, descent)
    counted = np.where(known, flops, 0.0)
    with np.errstate(invalid="ignore"):
        moving = np.where(counted > 0.0, movement * counted, 0.0)
        ratio = index.sum(moving) / index.sum(counted)
    usual = index.sum(np.nan_to_num(usual))
    return Weighed(index.sum(descent), ratio, index.sum(flops), usual, index.turns, step_flops)


def why_dense(weighed: Weighed, config: Config) -> list[str]:
    """Why each group is computed in every step, by what the policy would do otherwise; empty where it is not, [groups].

    It is asked again however little it comes to, with the default tolerance, without movement, with what steps usually
    win, with dW as a usual part, and where there is a budget with all of a step for it.
    """
    descent, ratio, flops, usual, turns, _ = weighed
    known = np.isfinite(descent) & np.isfinite(ratio)
    won = float(descent[known].sum())
    jumped = won > JUMP * float(usual[known].sum()) > 0.0
    otherwise: list[tuple[str, Weighed, Config]] = [
        (NO_ROOM, weighed, replace(config, tolerance=max(config.tolerance, USUAL_TOLERANCE))),
        (JUMPED, weighed._replace(descent=np.where(known & jumped, usual, descent)), config),
        (FAST, still := weighed._replace(ratio=np.where(known, 0.0, ratio)), config),
        (SMALL_PART, still._replace(step_flops=None), config),
    ]
    if config.budget:
        otherwise.insert(0, (ENOUGH, weighed, replace(config, budget=1.0)))
    reasons = np.full(len(descent), DEAR, object)
    for text, values, asked in reversed(otherwise):
        reasons[values.keep(asked) < SELDOM] = text
    reasons[weighed.keep(config, least=0.0) < SELDOM] = LITTLE
    reasons[turns < 2] = ALONE
    reasons[~known] = UNREAD
    reasons[flops == 0.0] = SMALL
    if known.any() and not won > 0.0:
        reasons[known & (flops > 0.0)] = NOTHING_WON
    reasons[weighed.keep(config) < SELDOM] = ""
    return list(map(str, reasons))
