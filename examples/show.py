"""What a comparison found: the table, what it means in words, the picture and the CSV files."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from compare import Run, Task

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SETTLE = 3
"""Steps in which compilation is expected; what is compiled after them is counted as late."""

ENOUGH = 6
"""Pairs below which no confidence interval is worth its name."""


@dataclass(frozen=True)
class Row:
    """One line of the table: a figure per arm, (median, lower, upper quartile) where there are many, or None."""

    label: str
    how: str
    values: list[Any]
    form: Callable[[Any], str]


def measures(task: Task, runs: list[Run], chunk: int) -> list[Row]:
    """All that is reported, arm by arm."""
    base, ours = runs[:2]

    def ratios(start: int) -> list[Any]:
        return [None, _quartiles(paired_ratios(base, ours, chunk, start)), *[None] * (len(runs) - 2)]

    def skipped(start: int) -> list[Any]:
        return [run.skipped(start) if run.status else None for run in runs]

    def times(late: bool) -> list[Any]:
        return [_quartiles(run.seconds[run.late if late else 0 :], 1e3) for run in runs]

    def total(what: Callable[[Any], int], start: int = 0) -> list[int]:
        return [sum(map(what, run.compiles[start:])) for run in runs]

    share, plain, ratio = "{:.1%}".format, "{:d}".format, _spread("{:.3f}")
    score = "{:.2%}".format if task.higher_is_better else "{:.4f}".format
    late = base.late
    after = f"after step {SETTLE}"
    return [
        Row(task.score, "measured", [float(run.scores.mean()) for run in runs], score),
        Row("steps", "counted", [run.arm.steps for run in runs], plain),
        Row("dW FLOPs skipped", "counted", skipped(0), share),
        Row("  in the last tenth", "counted", skipped(late), share),
        Row("step time, ms", "measured", times(late=False), _spread("{:.1f}")),
        Row("  in the last tenth", "measured", times(late=True), _spread("{:.1f}")),
        Row("step time to Inductor's, pairs", "measured", ratios(0), ratio),
        Row("  in the last tenth", "measured", ratios(late), ratio),
        Row("compiling, s", "measured", [run.compile_seconds() for run in runs], "{:.1f}".format),
        Row("training with compiling, s", "measured", [sum(run.seconds) for run in runs], "{:.1f}".format),
        Row(f"recompiles {after}", "counted", total(lambda new: new.captured, SETTLE), plain),
        Row("graphs compiled", "counted", total(lambda new: new.compiled), plain),
        Row("  taken from Inductor's cache", "counted", total(lambda new: new.cached), plain),
        Row(f"  first needed {after}", "counted", total(lambda new: new.compiled + new.cached, SETTLE), plain),
    ]


def paired_ratios(base: Run, other: Run, chunk: int, start: int = 0) -> list[float]:
    """Ratio of median step times, other to base, of each pair of chunks from step `start` on without compilation."""
    ratios = []
    for first in range(math.ceil(start / chunk) * chunk, base.arm.steps - chunk + 1, chunk):
        pair = slice(first, first + chunk)
        if not any(any(new) for run in (base, other) for new in run.compiles[pair]):
            ratios.append(median(other.seconds[pair]) / median(base.seconds[pair]))
    return ratios


def verdicts(task: Task, runs: list[Run], chunk: int) -> list[str]:
    """What the figures say, in plain words, and what they cannot say."""
    base, ours, *control = runs
    said = []
    if not ours.flops[-1][0]:
        same = "both arms have bit for bit the same losses" if ours.losses == base.losses else "yet the losses differ"
        said.append(f"{ours.arm.name} skipped nothing in this run, {same}.")
    said += [_quality(task, ours, other) for other in (base, *control)]
    for when, start in (("over the whole run", 0), ("in the last tenth", base.late)):
        ratios = paired_ratios(base, ours, chunk, start)
        if len(ratios) < ENOUGH:
            said.append(f"Step time {when}: {len(ratios)} pairs are too few to tell the arms apart.")
            continue
        middle, (low, high) = median(ratios), _median_interval(ratios)
        if low <= 1 <= high:
            word = f"{ours.arm.name} cannot be told apart from Inductor"
        else:
            word = f"{ours.arm.name} takes {abs(middle - 1):.1%} {'longer' if middle > 1 else 'less'} than Inductor"
        said.append(f"Step time {when}: {word} (median ratio {middle:.3f}, 95 % interval {low:.3f} to {high:.3f}).")
    said.append("One seed on one machine: other seeds move the scores too, and nothing here knows by how much.")
    return said


def _quality(task: Task, ours: Run, other: Run) -> str:
    gain = (ours.scores - other.scores) * (1 if task.higher_is_better else -1)
    form = "{:.2%}".format if task.higher_is_better else "{:.4f}".format
    mean, error = float(gain.mean()), 2 * float(gain.std(correction=0)) / max(1, len(gain) - 1) ** 0.5
    unclear = abs(mean) <= error
    word = "cannot be told apart from" if unclear else f"is {'better' if mean > 0 else 'worse'} than"
    apart = f"by {form(abs(mean))}, give or take {form(error)}: twice the standard error over {len(gain)} batches"
    return f"{task.score.capitalize()}: {ours.arm.name} {word} {other.arm.name} ({apart})."


def _median_interval(values: list[float]) -> tuple[float, float]:
    """95 % confidence interval of the median from order statistics; asks nothing of the distribution."""
    ordered, half, reach = sorted(values), len(values) / 2, len(values) ** 0.5
    return ordered[max(0, math.floor(half - reach))], ordered[min(len(values), math.ceil(half + reach)) - 1]


def _quartiles(values: Sequence[float], scale: float = 1) -> tuple[float, ...] | None:
    """(median, lower, upper quartile), None of nothing."""
    return tuple(float(part) * scale for part in np.quantile(values, (0.5, 0.25, 0.75))) if len(values) else None


def _spread(form: str) -> Callable[[tuple[float, ...]], str]:
    """A formatter of (median, lower, upper quartile)."""
    return lambda spread: f"{form} [{form}, {form}]".format(*spread)


def table(task: Task, runs: list[Run], rows: list[Row]) -> Table:
    """The rows, a column for each arm; each row says whether it was measured or counted."""
    caption = r"dW: gradients of weights. \[a, b]: quartiles. Arms of one backend share what is compiled."
    grid = Table(title=task.title, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("")
    for run in runs:
        grid.add_column(run.arm.name, justify="right")
    grid.add_column("")
    for row in rows:
        cells = ("-" if value is None else row.form(value).replace("[", r"\[") for value in row.values)
        grid.add_row(row.label, *cells, f"({row.how})")
    return grid


def write_csv(out: Path, runs: list[Run], rows: list[Row]) -> None:
    """curves.csv: a line for each step of each arm; summary.csv: a line for each figure of the table."""
    with open(out / "curves.csv", "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["arm", "step", "loss", "seconds", "skipped_dw_flops", "graphs_captured", "graphs_compiled"])
        for run in runs:
            for step, (loss, took, new) in enumerate(zip(run.losses, run.seconds, run.compiles, strict=True)):
                share = run.skipped(step, step + 1)
                lines.writerow([run.arm.name, step, loss, took, share, new.captured, new.compiled + new.cached])
    with open(out / "summary.csv", "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["measure", "how", "arm", "value", "lower_quartile", "upper_quartile"])
        label = ""
        for row in rows:
            label = label if row.label.startswith(" ") else row.label
            name = label if label == row.label else f"{label}, {row.label.strip()}"
            for run, value in zip(runs, row.values, strict=True):
                if value is not None:
                    figures = value if isinstance(value, tuple) else (value, "", "")
                    lines.writerow([name, row.how, run.arm.name, *figures])


def write_picture(path: Path, task: Task, runs: list[Run]) -> None:
    """Training loss of all arms above, the share of skipped weight-gradient FLOPs below."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(2, 1), layout="constrained")
    window = max(1, runs[0].arm.steps // 25)

    def smooth(values: Sequence[float]) -> list[float]:
        return [float(np.mean(values[max(0, step - window + 1) : step + 1])) for step in range(len(values))]

    looks = (("#555555", "-"), ("#d1495b", "-"), ("#2e86ab", "--"))
    for run, (color, style) in zip(runs, looks, strict=False):
        score = f"{run.scores.mean():.2%}" if task.higher_is_better else f"{run.scores.mean():.4f}"
        top.plot(smooth(run.losses), style, color=color, lw=1.4, label=f"{run.arm.name}: {task.score} {score}")
        if run.status:
            shares = [100 * run.skipped(step, step + 1) for step in range(len(run.flops))]
            bottom.plot(shares, color=color, lw=0.6, alpha=0.4)
            bottom.plot(smooth(shares), color=color, lw=1.4)
    settled = [loss for run in runs for loss in smooth(run.losses)[run.arm.steps // 20 :]]
    top.set(title=task.title, ylabel=f"training loss, nats\n(mean of {window} steps)")
    top.set_ylim(min(settled) - 0.05, max(settled) + 0.05)
    top.legend(frameon=False)
    bottom.set(xlabel="step", ylabel="dW FLOPs skipped, %", ylim=(-3, 103))
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
    figure.savefig(path, dpi=140)
    plt.close(figure)
