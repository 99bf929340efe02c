"""Is skipping worth it on a GPU, against a shorter dense run? Three models that train for about 20 seconds each.

    python -m benchmarks.gpu.quality --prepare        # first, where the network and the packages are: data into .data/
    make gpu-quality                                  # under 20 minutes; installs and fetches nothing
    python -m benchmarks.gpu.quality --minutes 8      # goes on with what is missing
    python -m benchmarks.gpu.quality --self-check     # tiny, on a CPU: checks that the benchmark itself works

Each task is trained dense and by convaware at default options, in turns, so that their seconds compare; and dense in
80 % of the steps, at the better of two peak rates. ResNet-18 (Fashion-MNIST) and MiniLM (weights and snippets) need
`.data/` on the GPU's machine, 62 MiB in all; the GPT learns torch's own sources. What has no data is left out. No run
is begun that would not end in time. Rows go to `<out>/<gpu>_quality.csv` as they come, tables and what is missing to
`.md`; a run that has its row is not made again.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import minilm
from benchmarks.gpu.quality_report import write_markdown
from benchmarks.gpu.quality_runs import COLUMNS, SHORTER, Turn, best_rate, known, make, read, turns
from benchmarks.gpu.tasks import NEEDS, TASKS
from benchmarks.gpu.worker import Failure, Worker
from benchmarks.lib.rows import RESULTS
from benchmarks.quality.rows import append
from examples.data import CACHE, find_fashion_mnist

REPORTING = 10.0
"""Seconds kept for starting, and for the last table."""


class Session:
    """What one call does: turn after turn, each task in a process of its own, until the time is over."""

    def __init__(self, args: argparse.Namespace, name: str, stem: Path) -> None:
        self.args, self.name = args, name
        self.csv, self.md = Path(f"{stem}_quality.csv"), Path(f"{stem}_quality.md")
        self.tiny: bool = args.self_check
        self.rows = {} if args.again else read(self.csv)
        self.end = time.monotonic() + 60 * args.minutes - REPORTING
        self.missing: list[tuple[str, str, str, str]] = []
        self.failed: dict[str, str] = {}
        """Task -> why; it is left out for the rest of this call."""
        self._workers: dict[str, Worker] = {}
        self._pace: dict[str, float] = {}
        """Task -> seconds of a step, in its last turn."""

    def run(self) -> None:
        """All turns that are missing."""
        for task in self.args.tasks:
            try:
                NEEDS[task]()
            except FileNotFoundError as error:
                self.missing.append((task, "all", "all", " ".join(str(error).split())))
        without = {task for task, *_ in self.missing}
        tasks = [task for task in self.args.tasks if task not in without]
        for turn in turns(tasks, self.args.seeds, lambda task: best_rate(self.rows, task, self.tiny) or SHORTER):
            if all(key in self.rows for key in turn.keys(self.tiny)):
                continue
            if why := self._why_not(turn) or self._make(turn):
                self.missing.append((turn.task, " and ".join(turn.arms), f"{turn.seed}, {turn.split}", why))
        for worker in self._workers.values():
            worker.stop()

    def _why_not(self, turn: Turn) -> str:
        if turn.task in self.failed:
            return self.failed[turn.task]
        rated = turn.split == "valid" or best_rate(self.rows, turn.task, self.tiny) is not None
        if turn.arms == (SHORTER,) and not rated:
            return "no rate was chosen"
        return "out of time" if self._expected(turn) > self._left() else ""

    def _make(self, turn: Turn) -> str:
        """Gives why it failed, or nothing."""
        begin = time.monotonic()
        worker = self._workers.setdefault(turn.task, Worker())
        try:
            made = worker.call(make, turn, self.args.device, self.tiny, timeout=self._left())
        except Failure as failure:
            if self._left() <= 0:
                return "out of time while it ran"
            self.failed[turn.task] = f"failed: {failure}"
            return self.failed[turn.task]
        for row in made:
            append(self.csv, row, COLUMNS)
            print(f"  {_sentence(row)}", flush=True)
        self.rows |= {key: row for key, row in read(self.csv).items() if key in turn.keys(self.tiny)}
        self._pace[turn.task] = (time.monotonic() - begin) / sum(row["steps"] for row in made)
        self.report()
        return ""

    def _left(self) -> float:
        return self.end - time.monotonic()

    def _expected(self, turn: Turn) -> float:
        """Seconds that a turn will take; 0 where nothing of its task has been timed."""
        return sum(key.steps for key in turn.keys(self.tiny)) * self._pace.get(turn.task, 0.0)

    def report(self) -> str:
        """Tables of the rows so far."""
        self.md.parent.mkdir(parents=True, exist_ok=True)
        args = self.args
        return write_markdown(self.rows, self.md, self.name, args.tasks, args.seeds, self.missing, self.tiny)


def _sentence(row: dict[str, Any]) -> str:
    parts = [f"quality {row['quality']:.4f}", f"{row['cost_flops']:.4g} FLOPs", f"{row['cost_seconds']:.1f} s"]
    if row["skipped_share"]:
        parts.append(f"{row['skipped_share']:.1%} of dW skipped")
    return f"{row['task']} {row['arm']} seed {row['seed']} ({row['split']}): {', '.join(parts)}"


def prepare() -> None:
    """Put into .data/ what the tasks need and a GPU's machine may not have."""
    if (found := find_fashion_mnist()).parent != CACHE:
        shutil.copytree(found, CACHE / "fashion-mnist", dirs_exist_ok=True)
    minilm.keep()
    print(f"{CACHE / 'fashion-mnist'} and {minilm.KEPT} are to travel with the checkout")


def _tasks(text: str) -> list[str]:
    try:
        return known(text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=20.0, help="for everything (default: %(default)g)")
    add("--tasks", type=_tasks, default=",".join(TASKS), help="some of %(default)s, which is the default")
    add("--seeds", type=lambda text: [int(part) for part in text.split(",")], help="default: 0,1,2; self-check: 0")
    add("--out", type=Path, help="folder; default: benchmarks/results, and for a self-check a temporary one")
    add("--device", choices=("cuda", "cpu"), help="default: cuda, and for a self-check cpu, which is for that alone")
    add("--again", action="store_true", help="make runs again that have a row")
    add("--prepare", action="store_true", help="put the data into .data/, and end")
    add("--self-check", action="store_true", help="tiny models, on a CPU")
    args = parser.parse_args(argv)
    args.seeds = args.seeds or ([0] if args.self_check else [0, 1, 2])
    args.device = args.device or ("cpu" if args.self_check else "cuda")
    if args.device == "cpu" and not args.self_check:
        parser.error("--device cpu is for --self-check; python -m benchmarks.quality has what suits a CPU")
    if args.device == "cuda" and not (args.prepare or torch.cuda.is_available()):
        parser.error("no GPU here; --self-check runs without one")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.prepare:
        prepare()
        return 0
    name = "self check" if args.self_check else torch.cuda.get_device_name()
    out = args.out or (Path(tempfile.mkdtemp()) if args.self_check else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    session = Session(args, name, out / re.sub(r"\W+", "_", name.lower()))
    session.run()
    print(session.report())
    print(f"{len(session.rows)} rows in {session.csv}")
    return int(bool(session.failed))


if __name__ == "__main__":
    sys.exit(main())
