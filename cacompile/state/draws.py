"""Random choices that are the same on every rank and after a resume."""

from __future__ import annotations

import numpy as np


def generator(seed: int, *counters: int) -> np.random.Generator:
    """The random numbers of one draw: a function of the seed and the counters alone, so nothing needs to be saved."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *counters])))


def draw(keep: np.ndarray, family: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Choose each group with its probability `keep`, spread evenly over families.

    Systematic sampling over a random order within each family: the number chosen in a family, and in all, is within
    one of its expectation, so the saving is the same in every step and some member of a large family is always fresh.

    keep: float [G] in 0..1; family: int [G], equal numbers belong together. Returns bool [G].
    """
    order = np.lexsort((rng.random(len(keep)), family))
    reached = np.floor(np.cumsum(keep[order]) + rng.random())
    chosen = np.empty(len(keep), bool)
    chosen[order] = np.diff(reached, prepend=0.0) > 0
    return chosen | (keep >= 1.0)
