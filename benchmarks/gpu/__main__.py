"""Everything about one GPU in one command: are the kernels right, how fast are they, what do whole models gain.

    make gpu                                             # under nine minutes; needs torch and triton, installs nothing
    python -m benchmarks.gpu --sections models --models llama --resume
    python -m benchmarks.gpu --self-check                # tiny, on a CPU: checks that the benchmark itself works

Sections, in this order: `check`; `tune`, which measures what an operation costs the host, and when a masked product is
better left to the library; `kernels`; `models`, which compile in the background, on the other cores, from `tune` on.
What the minutes do not suffice for is listed as not run. Rows, tables and plots go to `<out>/<gpu>*`, rows as they are
measured.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import torch

from benchmarks.gpu.check import Case, all_cases
from benchmarks.gpu.kernels import LIBRARY, measure
from benchmarks.gpu.models import PRESETS
from benchmarks.gpu.report import CHECK, KERNELS, draw, write_markdown
from benchmarks.gpu.rows import Rows
from benchmarks.gpu.shapes import SHAPES, TINY, Shape
from benchmarks.gpu.steps import Crew
from benchmarks.gpu.worker import Failure, Worker
from benchmarks.lib.rows import RESULTS, ROOT
from benchmarks.lib.timing import Spread, ratios

SECTIONS = ("check", "tune", "kernels", "models")
SHARES = {"check": 0.18, "tune": 0.14, "kernels": 0.22, "models": 0.46}
"""Of the minutes; what a section leaves over goes to the next ones."""

REPORTING = 8.0
"""Seconds kept for tables and plots."""


class Clock:
    """When each section has to end."""

    def __init__(self, minutes: float, sections: list[str]) -> None:
        begin, seconds = time.monotonic(), 60 * minutes - REPORTING
        total = sum(SHARES[name] for name in sections)
        self.end: dict[str, float] = {}
        for name in sections:
            begin += seconds * SHARES[name] / total
            self.end[name] = begin

    def left(self, section: str) -> float:
        return self.end[section] - time.monotonic()


def check(rows: Rows, clock: Clock, device: str, shapes: tuple[Shape, ...], workers: int) -> None:
    """Every case, in several processes: most of the time goes into compiling, and what is compiled stays on disk."""
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", **({} if device == "cuda" else {"TRITON_INTERPRET": "1"})}
    free: SimpleQueue[Worker] = SimpleQueue()
    for _ in range(workers):
        free.put(Worker(environment))

    def one(case: Case) -> float | tuple[str, str]:
        worker = free.get()
        try:
            if (left := clock.left("check")) < 1:
                return "not run", "out of time"
            return float(worker.call(case.function, *case.arguments, timeout=min(left + 5, 90)))
        except Failure as failure:
            return "failed", str(failure)
        finally:
            free.put(worker)

    cases = [case for case in all_cases(device, shapes) if not rows.has(CHECK, case.case, case.kernel)]
    with ThreadPoolExecutor(workers) as pool:
        for case, result in zip(cases, pool.map(one, cases)):
            if isinstance(result, tuple):
                rows.note(CHECK, case.case, case.kernel, *result)
            else:
                rows.add(CHECK, case.case, case.kernel, "relative error", "share", Spread.of([result]))
    while not free.empty():
        free.get().stop()


def run(module: str, *arguments: str, seconds: float) -> None:
    """Another benchmark in a process of its own; it too finds the package in the checkout, for nothing is installed."""
    subprocess.run([sys.executable, "-m", module, *arguments], check=True, timeout=seconds, cwd=ROOT)


def tune(clock: Clock, out: Path) -> None:
    """Measure when to use the library and when our kernels; later sections run in new processes, which read it.

    The package's own table changes, and a copy of it goes to `out`.
    """
    minutes = clock.left("tune") / 60
    try:
        run("benchmarks.kernels.tune", "--minutes", f"{minutes:.2f}", seconds=60 * minutes + 30)
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "cacompile" / "kernels" / "measured.csv", out)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"  tuning failed, the rules stay as they are: {error}", flush=True)


def overhead(out: Path) -> None:
    """What our operations cost the host, into `out`; seconds."""
    try:
        run("benchmarks.speed.overhead", "--device", "cuda", "--rounds", "200", "--out", str(out.resolve()), seconds=40)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"  host time was not measured: {error}", flush=True)


def kernels(rows: Rows, clock: Clock, device: str, shapes: tuple[Shape, ...], meanwhile: Callable[[], None]) -> None:
    """Shape after shape in one process, which is replaced if it fails; `meanwhile` is called now and then."""
    worker = Worker({} if device == "cuda" else {"TRITON_INTERPRET": "1"})
    for shape in shapes:
        meanwhile()
        left = clock.left("kernels")
        if rows.has(KERNELS, shape.case):
            continue
        if left < 2:
            rows.note(KERNELS, shape.case, "all", "not run", "out of time")
            continue
        try:
            found = worker.call(measure, shape, device, 2.0 if device == "cuda" else 0.1, timeout=min(left + 10, 45))
        except Failure as failure:
            rows.note(KERNELS, shape.case, "all", "failed", str(failure))
            continue
        base = found[LIBRARY, 1.0]
        for (way, share), times in found.items():
            arm, against = way if way == LIBRARY else f"{way} {share:.3g}", ratios(times, base)
            rows.add(KERNELS, shape.case, arm, "time", "ms", Spread.of(times))
            rows.add(KERNELS, shape.case, arm, "time", "ratio to library", against)
            if share:
                rate = Spread.of(share * shape.flops / (1e9 * each) for each in times)
                rows.add(KERNELS, shape.case, arm, "rate", "TFLOP/s", rate)
                rows.add(
                    KERNELS,
                    shape.case,
                    arm,
                    "rate",
                    "share of library's",
                    Spread.of(share * b / t for t, b in zip(times, base)),
                )
                rows.add(
                    KERNELS,
                    shape.case,
                    arm,
                    "time",
                    "over ideal",
                    Spread.of(t / (share * b) for t, b in zip(times, base)),
                )
        print(f"  {shape.case}: library {Spread.of(base).median:.3f} ms", flush=True)
    worker.stop()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="for everything; 8.5, and for a self-check as long as it takes")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="some of " + ",".join(SECTIONS))
    parser.add_argument("--models", default="", help="some of " + ",".join(PRESETS))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results, and for a self-check a temporary folder")
    parser.add_argument("--resume", action="store_true", help="keep what was finished today, run the rest")
    parser.add_argument("--self-check", action="store_true", help="tiny shapes and models, on a CPU")
    args = parser.parse_args(argv)
    args.minutes = args.minutes or (60.0 if args.self_check else 8.5)
    args.models = args.models or ("gpt2" if args.self_check else ",".join(PRESETS))
    for name, known in (("sections", SECTIONS), ("models", PRESETS)):
        chosen = getattr(args, name).split(",")
        if unknown := set(chosen) - set(known):
            parser.error(f"--{name}: unknown {', '.join(sorted(unknown))}; known: {', '.join(known)}")
        setattr(args, name, [each for each in known if each in chosen])
    if args.self_check:
        args.out = args.out or Path(tempfile.mkdtemp())
        args.sections = [name for name in args.sections if name != "tune"]
    elif not torch.cuda.is_available():
        parser.error("no GPU here; --self-check runs without one")
    args.out = args.out or RESULTS
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    clock = Clock(args.minutes, args.sections)
    device, tiny = ("cpu", True) if args.self_check else ("cuda", False)
    name = "self check" if tiny else torch.cuda.get_device_name()
    stem = args.out / re.sub(r"\W+", "_", name.lower())
    rows = Rows(Path(f"{stem}.csv"), name, resume=args.resume)
    shapes = TINY if tiny else SHAPES
    cores = os.cpu_count() or 1
    crew = Crew(args.models, rows, device=device, tiny=tiny, most=max(cores - 3, 3))

    def compile_models() -> None:
        if "models" in args.sections:
            crew.start()

    for section in args.sections:
        print(f"{section}: {clock.left(section):.0f} s", flush=True)
        if section != "check" or tiny:  # checking needs all cores, most of it is compiling
            compile_models()
        if section == "check":
            check(rows, clock, device, shapes, workers=1 if tiny else max(1, min(cores - 2, 12)))
        elif section == "tune":
            overhead(Path(f"{stem}_overhead.csv"))
            tune(clock, args.out)
        elif section == "kernels":
            kernels(rows, clock, device, shapes, compile_models)
        else:
            crew.measure(clock.end["models"], most_rounds=3 if tiny else 15)
    crew.stop()
    print(write_markdown(rows, Path(f"{stem}.md")))
    draw(rows, stem)
    failed = [row for row in rows.rows if row["measure"] == "failed"]
    print(f"{len(rows.rows)} rows in {stem}.csv; failed: {len(failed)}")
    return 1 if any(row["benchmark"] == CHECK for row in failed) else 0


if __name__ == "__main__":
    sys.exit(main())
