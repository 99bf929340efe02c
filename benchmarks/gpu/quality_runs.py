"""The runs of `benchmarks.gpu.quality`: which there are, who takes turns with whom, and how a process makes them."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.tasks import TASKS, task_on
from benchmarks.quality.arms import ARMS, DEV_SEED, rated
from benchmarks.quality.plan import TIMED, tiny_arm
from benchmarks.quality.rows import COLUMNS as QUALITY_COLUMNS
from benchmarks.quality.rows import Key, stamp
from benchmarks.quality.run import Arm, Run, train
from benchmarks.quality.task import Split

SHORTER = "dense-80"
RATES = (1.0, 1.5)
"""Times the task's peak rate: the shorter dense run has the better of them."""

STRIDE = 25
"""Steps that are timed together, after which the other run of a turn goes on."""

COLUMNS = (*QUALITY_COLUMNS, "step_seconds")
"""step_seconds: of each stride, the mean of its steps; nan where something was compiled."""

Row = dict[str, str]


class Turn(NamedTuple):
    """Runs that are trained interleaved."""

    task: str
    arms: tuple[str, ...]
    seed: int
    split: Split

    def keys(self, tiny: bool) -> list[Key]:
        return [
            Key(self.task, name, self.seed, self.split, round(steps_of(self.task, tiny) * ARMS[name].fraction))
            for name in self.arms
        ]


def steps_of(task: str, tiny: bool) -> int:
    return task_on(task, "cpu", tiny=tiny).steps


def turns(tasks: Sequence[str], seeds: Sequence[int], chosen: Callable[[str], str]) -> Iterator[Turn]:
    """The most telling first. chosen: the shorter dense arm at its rate, asked once both rates were tried."""
    for seed in seeds:
        for task in tasks:
            yield Turn(task, TIMED, seed, "test")
            if seed == seeds[0]:
                yield from (Turn(task, (rated(SHORTER, rate),), DEV_SEED, "valid") for rate in RATES)
            yield Turn(task, (chosen(task),), seed, "test")


def best_rate(rows: dict[Key, Row], task: str, tiny: bool) -> str | None:
    """The shorter dense arm that was better on validation data; None before both were tried. A loss of NaN is worst."""
    found = {}
    for rate in RATES:
        turn = Turn(task, (rated(SHORTER, rate),), DEV_SEED, "valid")
        [key] = turn.keys(tiny)
        if key not in rows:
            return None
        quality = float(rows[key]["quality"])
        found[key.arm] = quality if quality == quality else float("-inf")
    return max(found, key=lambda arm: found[arm])


def read(file: Path) -> dict[Key, Row]:
    """All rows; of a run that was made twice the later."""
    if not file.exists():
        return {}
    with open(file, newline="") as lines:
        reader = csv.DictReader(lines)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{file} has columns {', '.join(reader.fieldnames or ())}; expected {', '.join(COLUMNS)}")
        rows = list(reader)
    return {
        Key(row["task"], row["arm"], int(row["seed"]), row["split"], int(row["steps"])): row for row in rows
    }  # fmt: skip


def make(turn: Turn, device: str, tiny: bool) -> list[dict[str, Any]]:
    """Train the runs of a turn, interleaved; a row for each."""
    torch._dynamo.config.recompile_limit = 256  # every run is one
    rehearse(turn.task, device, tiny)
    task = task_on(turn.task, device, tiny=tiny)
    stride = 5 if tiny else STRIDE
    runs = [Run(task, _arm(name, device, tiny), turn.seed, stride=stride) for name in turn.arms]
    train(runs, chunk=1)
    made = stamp()
    if device == "cuda":
        made["device"] = torch.cuda.get_device_name()
    return [
        {
            **dict(zip(Key._fields, key, strict=True)), **run.result(turn.split), **made,
            "beside": " ".join(other for other in turn.arms if other != run.arm.name),
            "options": json.dumps(run.arm.options, sort_keys=True) if run.arm.options else "",
            "step_seconds": " ".join(f"{took:.5g}" for took in run.clean_seconds[::stride]),
        }
        for key, run in zip(turn.keys(tiny), runs, strict=True)
    ]  # fmt: skip


def _arm(name: str, device: str, tiny: bool) -> Arm:
    """In a self-check on a CPU graphs run operation by operation: a C++ compiler would take minutes."""
    arm = tiny_arm(ARMS[name]) if tiny else ARMS[name]
    if device == "cuda":
        return arm
    if arm.backend == "convaware":
        return replace(arm, options={**arm.options, "inner": "aot_eager"})
    return replace(arm, backend="aot_eager")


@functools.cache
def rehearse(task_name: str, device: str, tiny: bool) -> None:
    """Compile all that the runs will need, so that none of it falls into their time: once in each process.

    Half of the groups are left out, at random: Triton compiles a masked product when it first leaves something out,
    and no counter tells of that.
    """
    task = task_on(task_name, device, tiny=tiny)
    profile = [0.0, 0.0, *6 * [0.5]]
    arms = ((_arm("dense", device, tiny), ()), (_arm("random", device, tiny), profile))
    train([Run(task, arm, DEV_SEED, steps=len(profile), profile=shares) for arm, shares in arms])


def known(names: Sequence[str]) -> list[str]:
    """Tasks in their own order; ValueError names those that there are not."""
    if unknown := set(names) - set(TASKS):
        raise ValueError(f"unknown {', '.join(sorted(unknown))}; known: {', '.join(TASKS)}")
    return [name for name in TASKS if name in names]
