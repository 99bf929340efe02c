"""What the benchmarks share: interleaved rounds, ratios with quartiles, one CSV schema, the example models."""

from __future__ import annotations

import csv
import datetime
import gc
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = ("date", "torch", "python", "device", "threads", "benchmark", "case", "arm", "measure",
           "unit", "median", "lower_quartile", "upper_quartile", "rounds")  # fmt: skip

sys.path.insert(0, str(ROOT / "examples"))


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


def write_rows(
    file: Path, benchmark: str, rows: Iterable[tuple[str, str, str, str, Spread]], device: str | None = None
) -> None:
    """Write (case, arm, measure, unit, spread) rows with date and versions; replaces the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if device is None:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + " CPU"
    stamp = (datetime.date.today().isoformat(), torch.__version__, platform.python_version(), device)
    with open(file, "w", newline="") as out:
        lines = csv.writer(out, lineterminator="\n")
        lines.writerow(COLUMNS)
        for case, arm, measure, unit, spread in rows:
            figures = (f"{spread.median:.5g}", f"{spread.lower:.5g}", f"{spread.upper:.5g}", spread.rounds)
            lines.writerow((*stamp, torch.get_num_threads(), benchmark, case, arm, measure, unit, *figures))
