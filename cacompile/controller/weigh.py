"""What the policy is given of each group, and why it has one of them computed in every step."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from cacompile.config import Config
from cacompile.state.groups import Numbering

from .policy import keep_probabilities
from .spikes import JUMP

UNREAD = "no score yet"
SMALL = "too small, costs no dW FLOPs of its own"
NOTHING_WON = "nothing is won by a step, as at a learning rate of zero"
JUMPED = "wins far more than usual just now"
NO_ROOM = "the option tolerance leaves no room for it"
FAST = "still moves fast"
DEAR = "too dear, wins too much for its FLOPs"

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

    def keep(self, config: Config) -> np.ndarray:
        """How often the policy has each group computed, float [groups]."""
        return keep_probabilities(self.descent, self.ratio, self.flops, self.usual, config)


def weigh(
    index: Numbering,
    descent: np.ndarray,
    movement: np.ndarray,
    flops: np.ndarray,
    usual: np.ndarray,
    fixed: np.ndarray,
) -> Weighed:
    """Groups' values from those of their blocks, each [blocks].

    fixed: bool, what is frozen or always kept: it wins nothing and costs nothing, not to be weighed against others.
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
    return Weighed(index.sum(descent), ratio, index.sum(flops), index.sum(np.nan_to_num(usual)))


def why_dense(weighed: Weighed, config: Config) -> list[str]:
    """Why each group is computed in every step, by what the policy would do otherwise; empty where it is not, [groups].

    It is asked again with a tolerance of 1, without movement, and with what steps usually win.
    """
    descent, ratio, flops, usual = weighed
    known = np.isfinite(descent) & np.isfinite(ratio)
    won = float(descent[known].sum())
    jumped = won > JUMP * float(usual[known].sum()) > 0.0
    otherwise: list[tuple[str, Weighed, Config]] = [
        (NO_ROOM, weighed, replace(config, tolerance=1.0)),
        (JUMPED, weighed._replace(descent=np.where(known & jumped, usual, descent)), config),
        (FAST, weighed._replace(ratio=np.where(known, 0.0, ratio)), config),
    ]
    reasons = np.full(len(descent), DEAR, object)
    for text, values, asked in reversed(otherwise):
        reasons[values.keep(asked) < SELDOM] = text
    reasons[~known] = UNREAD
    reasons[flops == 0.0] = SMALL
    if known.any() and not won > 0.0:
        reasons[known & (flops > 0.0)] = NOTHING_WON
    reasons[weighed.keep(config) < SELDOM] = ""
    return list(map(str, reasons))
