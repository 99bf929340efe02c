"""A process of `benchmarks.quality`: makes the runs it is sent, all of one task, so that graphs are compiled once."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from benchmarks.quality.plan import Part, Settings, Turn, next_part
from benchmarks.quality.rows import read_profile, stamp, write_profile
from benchmarks.quality.run import Run, train

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error",
}  # fmt: skip

Event = tuple[str, Any]
"""("step", task), ("look", columns), ("row", columns), ("failed", (task, turn, text)) or ("idle", None)."""


def work(pipe: Connection, settings: Settings) -> None:
    """Make parts as they come, until None does."""
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 256  # every arm and seed with options of its own is one
    while (part := pipe.recv()) is not None:
        for turn in part.turns:
            try:
                for row in make(part.task, turn, settings, lambda: pipe.send(("step", part.task))):
                    pipe.send(("look" if "step" in row else "row", row))
            except Exception:
                pipe.send(("failed", (part.task, turn, traceback.format_exc())))
        pipe.send(("idle", None))


def make(task_name: str, turn: Turn, settings: Settings, tick: Any = lambda: None) -> Iterator[dict[str, Any]]:
    """Train the runs of a turn, interleaved, and give each one's row."""
    task, runs = settings.task(task_name), []
    for name in turn.arms:
        arm = settings.arm(name)
        profile = read_profile(settings.profile(task_name, turn.seed)) if arm.needs_profile else ()
        runs.append(Run(task, arm, turn.seed, profile=profile))
    looks: dict[str, list[dict[str, Any]]] = {run.arm.name: [] for run in runs}
    train(runs, tick=tick, look=lambda run: looks[run.arm.name].append(run.result(settings.split)))
    for run in runs:
        name = run.arm.name
        key = {"task": task_name, "arm": name, "seed": turn.seed, "split": settings.split, "steps": run.steps}
        for found in looks[name]:
            yield {**key, "step": found["steps_taken"],
                   **{each: found[each] for each in ("cost_flops", "cost_seconds", "quality")}}  # fmt: skip
        if name == "convaware":
            write_profile(settings.profile(task_name, turn.seed), run.skipped)
        options = json.dumps(run.arm.options, sort_keys=True) if run.arm.options else ""
        beside = " ".join(other for other in turn.arms if other != name)
        yield {**key, **run.result(settings.split), "beside": beside, "options": options, **stamp()}


@dataclass
class Worker:
    """The parent's side of a process."""

    process: BaseProcess
    pipe: Connection
    part: Part
    waiting: list[Turn] = field(default_factory=list)
    """Turns of the part that have neither ended nor failed."""

    def give(self, part: Part) -> None:
        self.part, self.waiting = part, list(part.turns)
        self.pipe.send(part)


@contextmanager
def environment() -> Iterator[None]:
    """What processes must find when they start."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def spread(parts: list[Part], jobs: int, settings: Settings) -> Iterator[Event]:
    """Make all parts in `jobs` processes and tell what happens. A process that dies fails its part only."""
    left, workers = list(parts), []

    def take(last: str | None = None) -> Part | None:
        part = next_part(left, [worker.part.task for worker in workers], last)
        if part is not None:
            left.remove(part)
        return part

    def start(part: Part) -> None:
        ours, theirs = get_context("spawn").Pipe()
        process = get_context("spawn").Process(target=work, args=(theirs, settings), daemon=True)
        with environment():
            process.start()
        theirs.close()
        workers.append(Worker(process, ours, part))
        workers[-1].give(part)

    try:
        while left or workers:
            while len(workers) < jobs and (part := take()) is not None:
                start(part)
            for pipe in wait([worker.pipe for worker in workers]):
                worker = next(worker for worker in workers if worker.pipe is pipe)
                try:
                    kind, what = worker.pipe.recv()
                except (EOFError, ConnectionResetError):
                    worker.process.join()
                    for turn in worker.waiting:
                        yield "failed", (worker.part.task, turn, f"process ended: {worker.process.exitcode}")
                    workers.remove(worker)
                    continue
                if kind == "idle":
                    task = worker.part.task
                    workers.remove(worker)
                    part = take(task)
                    if part is not None and part.task == task:
                        workers.append(worker)
                        worker.give(part)
                    else:
                        worker.pipe.send(None)
                        worker.process.join()
                        if part is not None:
                            start(part)
                    continue
                if kind == "row":
                    worker.waiting = [t for t in worker.waiting if (what["arm"], what["seed"]) != (t.arms[-1], t.seed)]
                if kind == "failed":
                    worker.waiting.remove(what[1])
                yield kind, what
    finally:
        for worker in workers:
            worker.process.terminate()
