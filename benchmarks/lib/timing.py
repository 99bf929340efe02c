"""Interleaved rounds, and ratios with quartiles of what they took."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch


class Spread(NamedTuple):
    """Median and quartiles of some rounds."""

    median: float
    lower: float
    upper: float
    rounds: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        values = sorted(values)
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper, len(values))

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.lower:.3f}, {self.upper:.3f}]"


def wall_clock(call: Callable[[], object]) -> float:
    """Seconds that a call took."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def synchronize(device: str) -> None:
    """Wait until a GPU has done all that it was told; the host's own work is done when a call returns."""
    if device == "cuda":
        torch.cuda.synchronize()


def gpu_clock(call: Callable[[], object]) -> float:
    """Seconds that a GPU worked on what a call launched; it sleeps first, so that the host is ahead, as in training."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(6_000_000)  # cycles: about three milliseconds, for many launches
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleave(
    arms: Mapping[str, Callable[[], object]],
    rounds: int,
    seed: int = 0,
    clock: Callable[[Callable[[], object]], float] = wall_clock,
) -> dict[str, list[float]]:
    """Seconds that each arm took in each round; within a round all arms run once, in random order."""
    order, shuffle = list(arms), random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle.shuffle(order)
            for name in order:
                seconds[name].append(clock(arms[name]))
    finally:
        gc.enable()
    return seconds


def ratios(over: list[float], under: list[float]) -> Spread:
    """Round by round, so that what slows the machine down for a while hits both sides."""
    return Spread.of(a / b for a, b in zip(over, under, strict=True))
