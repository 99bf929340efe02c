"""Times of single operations on a GPU: events around each, all arms interleaved, caches flushed, operands rotating."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.lib.timing import synchronize

FLUSH_BYTES = 256 << 20
"""More than any L2 cache: written before each measured operation."""

HEAD_START = 4_000_000
"""Cycles, about two milliseconds, that the GPU waits before each operation while the host queues it. Without it short
operations would show the host's speed: in a training step the queue is full, and whole steps are timed apart."""


class HostEvent:
    """`torch.cuda.Event` for machines without a GPU."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, later: HostEvent) -> float:
        return 1e3 * (later.at - self.at)


def event(device: str) -> Any:
    return torch.cuda.Event(enable_timing=True) if device == "cuda" else HostEvent()


def interleaved(
    arms: Mapping[str, Callable[[int], object]], *, device: str, seconds: float, most: int = 25, warmup: int = 2
) -> dict[str, list[float]]:
    """Milliseconds that each arm took in each round; called with the number of the round, which chooses its operands.

    Within a round all arms run once, in random order. Ends after `most` rounds, or after `seconds` and three rounds.
    """
    flush = torch.empty(FLUSH_BYTES if device == "cuda" else 1, dtype=torch.uint8, device=device)
    order, shuffle = list(arms), random.Random(0)
    found: dict[str, list[float]] = {name: [] for name in arms}
    for name in order:
        for i in range(warmup):
            arms[name](i)
    synchronize(device)
    end = time.monotonic() + seconds
    for i in range(most):
        if i >= 3 and time.monotonic() > end:
            break
        shuffle.shuffle(order)
        marks = {}
        for name in order:
            marks[name] = event(device), event(device)
            if device == "cuda":
                torch.cuda._sleep(HEAD_START)
            flush.zero_()
            marks[name][0].record()
            arms[name](i)
            marks[name][1].record()
        synchronize(device)
        for name, (begin, finish) in marks.items():
            found[name].append(begin.elapsed_time(finish))
    return found
