"""Which runs of `benchmarks.quality` are still to be made, in what order, by whom."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from benchmarks.quality.arms import ARMS, DENSE, applies
from benchmarks.quality.rows import Key, profile_file
from benchmarks.quality.run import Arm
from benchmarks.quality.task import Split, Task
from benchmarks.quality.tasks import TASKS

SECONDS = {
    "minilm-long": 0.7, "minilm-half": 0.5, "minilm-lora": 0.6, "transfer": 0.06, "vit-long": 0.3, "resnet-long": 0.5,
    "gpt-long": 0.25, "vit-over": 0.1, "gpt": 0.45, "resnet": 0.45, "vit": 0.3, "vit64": 0.07, "minilm": 0.7,
}  # fmt: skip
"""Of one step, about: only what takes longest must start first."""

TIMED = ("dense", "convaware")
"""Trained in turns, so that the machine's noise hits both alike and their times can be compared."""

TINY_STEPS = 20
TINY = {"warmup_steps": 2, "monitor_every": 1, "tolerance": 1.0, "max_skip": 1.0, "block_rows": 8}
"""Options of convaware in the smoke mode, with which it skips at once."""
TINY_RATE = 0.1
"""Times the learning rate in the smoke mode: slow enough for skipping to be worth it."""


def tiny_task(task: Task) -> Task:
    """The task with its tiny model, few steps, 16 samples a batch, two batches to be tested on."""
    return replace(
        task,
        build=task.tiny,
        steps=TINY_STEPS,
        batches=lambda seed: (tuple(part[:16] for part in batch) for batch in task.batches(seed)),
        held_out=lambda split: itertools.islice(task.held_out(split), 2),
    )


def tiny_arm(arm: Arm) -> Arm:
    """The arm for a tiny task: convaware skips at once, and all learn slowly."""
    tiny = TINY if arm.backend == "convaware" else {}
    return replace(arm, options={**tiny, **arm.options}, rate=arm.rate * TINY_RATE)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What holds for all runs of one call."""

    out: Path
    split: Split = "test"
    scale: float = 1.0
    """Of the steps of every task."""
    smoke: bool = False

    def task(self, name: str) -> Task:
        task = TASKS[name]
        return tiny_task(task) if self.smoke else replace(task, steps=round(task.steps * self.scale))

    def arm(self, name: str) -> Arm:
        return tiny_arm(ARMS[name]) if self.smoke else ARMS[name]

    def steps(self, task: str, arm: str) -> int:
        return round(self.task(task).steps * ARMS[arm].fraction)

    def key(self, task: str, arm: str, seed: int) -> Key:
        return Key(task, arm, seed, self.split, self.steps(task, arm))

    @property
    def report(self) -> str:
        """What its report and plots are called: what is reported, of the tasks' own lengths, is apart from the rest."""
        return "quality" + "-valid" * (self.split == "valid") + f"-{self.scale:g}" * (self.scale != 1.0)

    @property
    def rows(self) -> Path:
        return self.out / "quality.csv"

    @property
    def looks(self) -> Path:
        return self.out / "quality_looks.csv"

    def profile(self, task: str, seed: int) -> Path:
        return profile_file(self.out, task, self.steps(task, "convaware"), seed)


class Turn(NamedTuple):
    """Runs that are trained interleaved."""

    arms: tuple[str, ...]
    seed: int


class Part(NamedTuple):
    """What one process does without asking again: all that one seed of a task needs."""

    task: str
    turns: tuple[Turn, ...]
    steps: int


def plan(
    tasks: Sequence[str], arms: Sequence[str], seeds: Sequence[int], settings: Settings, done: Collection[Key]
) -> list[Part]:
    """A part for each task and seed of which some run is missing."""
    parts = []
    for task, seed in itertools.product(tasks, seeds):
        if turns := tuple(_turns(task, seed, arms, settings, done)):
            parts.append(Part(task, turns, sum(settings.steps(task, arm) for turn in turns for arm in turn.arms)))
    return parts


def _turns(task: str, seed: int, arms: Sequence[str], settings: Settings, done: Collection[Key]) -> Iterator[Turn]:
    wanted = [arm for arm in ARMS if arm in arms and applies(ARMS[arm], settings.task(task))]
    missing = {arm for arm in wanted if settings.key(task, arm, seed) not in done}
    if any(ARMS[arm].needs_profile for arm in missing) and not settings.profile(task, seed).exists():
        missing.add("convaware")
    if timed := tuple(arm for arm in TIMED if arm in missing):
        yield Turn(timed, seed)
    for arm in sorted(missing - set(TIMED), key=lambda arm: (arm in DENSE, list(ARMS).index(arm))):
        yield Turn((arm,), seed)


def next_part(parts: Sequence[Part], at_work: Sequence[str], last: str | None) -> Part | None:
    """Of the task that was done last, which is compiled already; else of the one with most left for each process on it.

    at_work: the tasks of the other processes.
    """
    left: dict[str, float] = {}
    for part in parts:
        left[part.task] = left.get(part.task, 0.0) + part.steps * SECONDS[part.task]
    if not left:
        return None
    task = last if last in left else max(left, key=lambda name: left[name] / (1 + at_work.count(name)))
    return next(part for part in parts if part.task == task)
