"""A plugin that makes pytest's durations seconds of the processor, on a machine that does other things as well.

python -m pytest -p tests.cpu_seconds --durations=0
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

TICKS = os.sysconf("SC_CLK_TCK")
LEAST = 0.02
"""Seconds by the clock below which a phase counts as nothing: to look at all processes takes milliseconds."""


def spent(root: int) -> float:
    """Seconds of the processor that a process and all that it has started have taken, by Linux's /proc."""
    children, seconds = defaultdict(list), defaultdict(float)
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        children[int(fields[1])].append(int(folder.name))
        seconds[int(folder.name)] = sum(map(int, fields[11:15])) / TICKS  # own, and of those that it has waited for
    found, total = [root], 0.0
    for process in found:
        total += seconds[process]
        found += children[process]
    return total


_before = 0.0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Iterator[None]:
    global _before
    report = yield
    if call.duration < LEAST:
        report.duration = 0.0
    else:
        now = spent(os.getpid())
        report.duration, _before = now - _before, now
    return report


def pytest_collection_finish() -> None:
    global _before
    _before = spent(os.getpid())
