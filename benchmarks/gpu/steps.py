"""Step times of whole models: every arm in a process of its own, all compiling at once, stepping one at a time.

The arms of one model take turns, round by round, and no other process uses the GPU: interleaved as in one process, but
they compile side by side on all cores, and one that fails or runs out of memory costs its own figures only.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from benchmarks.gpu.arm import KINDS, run_arm
from benchmarks.gpu.models import PRESETS
from benchmarks.gpu.rows import Rows
from benchmarks.gpu.worker import Failure, Process
from benchmarks.lib.timing import Spread, ratios

BENCHMARK = "gpu models"
KEEPS = (0.75, 0.5, 0.25, 0.0)
STEPS = 3
"""Timed steps of an arm in a round, after one that is not timed; a round's figure is their median."""

MOST_ALIVE = 20
"""Each holds a few gigabytes of memory, and its weights on the GPU, from when it starts."""

LONGEST_WARM_UP = 60.0
"""Seconds; an arm that hangs costs no more."""

ALONE = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
"""Compile inside each process: there are as many of them as cores."""


class Arm(NamedTuple):
    """What is timed: a process, and the share of groups it is told to keep."""

    name: str
    kind: str
    keep: float | None


ARMS = (
    Arm("inductor", "inductor", None),
    Arm("convaware dense", "convaware", 1.0),
    *(Arm(f"convaware keep {keep:g}", "convaware", keep) for keep in KEEPS),
    Arm("oracle", "oracle", None),
)


class Round(NamedTuple):
    """What one arm did in one round: milliseconds a step, and the share of dW FLOPs that it skipped."""

    passes: float
    """Forward and backward."""
    step: float
    skipped: float

    @classmethod
    def of(cls, passes: list[float], steps: list[float], skipped: float) -> Round:
        return cls(Spread.of(passes).median, Spread.of(steps).median, skipped)


class ModelArms:
    """The arms of one model, with or without CUDA graphs."""

    def __init__(self, model: str, graphs: bool, device: str, tiny: bool) -> None:
        self.case = (
            f"{PRESETS[model].title}{' (tiny)' if tiny else ''}, {'CUDA graphs' if graphs else 'no CUDA graphs'}"
        )
        self.failures: dict[str, str] = {}
        self.compiled: dict[str, float] = {}
        self.processes: dict[str, Process] = {}
        self._waiting = [(kind, (model, kind, graphs, device, tiny)) for kind in KINDS]

    def start_one(self) -> bool:
        """Start one more of its processes; False if all have been."""
        if not self._waiting:
            return False
        kind, arguments = self._waiting.pop(0)
        self.processes[kind] = Process(run_arm, *arguments, environment=ALONE)
        return True

    @contextlib.contextmanager
    def _attempt(self, kind: str) -> Iterator[None]:
        """What fails inside is the end of that process, and of nothing else."""
        try:
            yield
        except Failure as failure:
            self.failures[kind] = str(failure)
            self.processes.pop(kind).stop()

    def is_compiled(self) -> bool:
        """Whether all its processes wait at the gate, or have failed."""
        for kind, process in list(self.processes.items()):
            if kind not in self.compiled and process.pipe.poll(0):
                with self._attempt(kind):
                    self.compiled[kind] = process.receive(1)
        return not self._waiting and all(kind in self.compiled for kind in self.processes)

    def warm_up(self, seconds: float) -> dict[str, float]:
        """One after the other, for Inductor measures kernels while they warm up; kind -> peak memory in GiB."""
        end, peaks = time.monotonic() + seconds, {}
        for kind, process in list(self.processes.items()):
            with self._attempt(kind):
                process.send("go")
                process.send([arm.keep for arm in ARMS if arm.kind == kind])
                peaks[kind] = process.receive(min(end - time.monotonic(), LONGEST_WARM_UP))
        return peaks

    def rounds(self, seconds: float, most: int) -> dict[Arm, list[Round]]:
        """As many rounds as fit into `seconds`, at least three, at most `most`."""
        found: dict[Arm, list[Round]] = {arm: [] for arm in ARMS}
        order, shuffle = list(ARMS), random.Random(0)
        end = time.monotonic() + seconds
        for i in range(most):
            if i >= 3 and time.monotonic() > end:
                break
            shuffle.shuffle(order)
            for arm in order:
                if (process := self.processes.get(arm.kind)) is not None:
                    with self._attempt(arm.kind):
                        process.send((arm.keep, i, STEPS))
                        found[arm].append(Round.of(*process.receive(60)))
        return {arm: rounds for arm, rounds in found.items() if rounds}

    def stop(self) -> None:
        for process in self.processes.values():
            process.stop()
        self.processes.clear()


class Crew:
    """All groups, the most valuable first; `most` processes compile at a time, and MOST_ALIVE may wait or compile."""

    def __init__(self, models: Iterable[str], rows: Rows, *, device: str, tiny: bool, most: int) -> None:
        # without a GPU there is no graph to capture: tiny models show that the arms run at all
        pairs = ((model, graphs) for graphs in ((False, True), (True,))[tiny] for model in models)
        groups = [ModelArms(model, graphs, device, tiny) for model, graphs in pairs]
        self.rows, self.most = rows, most
        self.groups = [group for group in groups if not rows.has(BENCHMARK, group.case)]

    def start(self) -> None:
        """As many processes as there is room for now; to be called now and then."""
        for group in self.groups:
            group.is_compiled()
        alive = sum(len(group.processes) for group in self.groups)
        compiling = sum(kind not in group.compiled for group in self.groups for kind in group.processes)
        for group in self.groups:
            while compiling < self.most and alive < MOST_ALIVE and group.start_one():
                alive, compiling = alive + 1, compiling + 1

    def measure(self, end: float, *, most_rounds: int = 15) -> None:
        """Time one group after the other, as they get ready, until `end`."""
        while self.groups:
            self.start()
            ready = next((group for group in self.groups if group.is_compiled()), None)
            if time.monotonic() > end - 5:
                break
            if ready is None:
                time.sleep(0.2)
                continue
            left = end - time.monotonic()
            self._time(ready, left, min(12.0, left / len(self.groups) / 2), most_rounds)
            self.groups.remove(ready)
            ready.stop()
        for group in self.groups:
            for kind, why in group.failures.items():
                self.rows.note(BENCHMARK, group.case, kind, "failed", why)
            done = "compiled" if group.is_compiled() else "still compiling"
            self.rows.note(BENCHMARK, group.case, "all", "not run", f"out of time, {done}")
        self.stop()

    def _time(self, group: ModelArms, left: float, seconds: float, most_rounds: int) -> None:
        print(f"{group.case}", flush=True)
        begin = time.monotonic()
        peaks = group.warm_up(left)
        warm = time.monotonic() - begin
        times = group.rounds(seconds, most_rounds)
        for kind, why in group.failures.items():
            self.rows.note(BENCHMARK, group.case, kind, "failed", why)
        for kind, peak in peaks.items():
            self.rows.add(BENCHMARK, group.case, kind, "peak memory", "GiB", Spread.of([peak]))
            self.rows.add(BENCHMARK, group.case, kind, "compiled", "s", Spread.of([group.compiled[kind]]))
        for field, measure in (("passes", "forward and backward"), ("step", "whole step")):
            each = {arm: [getattr(one, field) for one in rounds] for arm, rounds in times.items()}
            for arm, values in each.items():
                self.rows.add(BENCHMARK, group.case, arm.name, measure, "ms", Spread.of(values))
                for base in (ARMS[0], ARMS[-1]):
                    if common := min(len(values), len(each.get(base, ()))):
                        spread = ratios(values[:common], each[base][:common])
                        self.rows.add(BENCHMARK, group.case, arm.name, measure, f"ratio to {base.name}", spread)
        for arm, rounds in times.items():
            if arm.kind == "convaware":
                shares = Spread.of(one.skipped for one in rounds)
                self.rows.add(BENCHMARK, group.case, arm.name, "dW FLOPs skipped", "share", shares)
        print(f"  warm-up {warm:.1f} s, rounds {time.monotonic() - begin - warm:.1f} s", flush=True)

    def stop(self) -> None:
        for group in self.groups:
            group.stop()
