"""This step's choice: which groups are kept. Pure functions of probabilities, a seed and whose turn it is."""

from __future__ import annotations

import numpy as np

ROUNDING = 1e-9


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


def first_turns(family: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Where each group starts on its way to its next turn, float [G] in 0..1: at random, evenly spread over a family.

    family: int [G], equal numbers belong together.
    """
    order = np.lexsort((rng.random(len(family)), family))
    _, first, sizes = np.unique(family[order], return_index=True, return_counts=True)
    due = np.empty(len(family))
    due[order] = (np.arange(len(family)) - np.repeat(first, sizes) + np.repeat(rng.random(len(sizes)), sizes)) / (
        np.repeat(sizes, sizes)
    )
    return due


def take_turns(keep: np.ndarray, due: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Choose the groups whose turn has come: each as often as its probability says, at distances as equal as can be.

    A group that is kept with probability 1/4 is computed in every fourth step. Independent draws have the same mean
    but long gaps too, in which a parameter runs on along an old gradient (`benchmarks/policies.py` compares them).

    keep: float [G] in 0..1; due: float [G] in 0..1. Returns (chosen: bool [G], due for the next step).
    """
    due = due + keep
    chosen = (due >= 1.0 - ROUNDING) | (keep >= 1.0)
    return chosen, np.clip(due - chosen, 0.0, 1.0)
