"""The table of `benchmarks.gpu.quality` in Markdown, and what was not run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.gpu.quality_runs import SHORTER, Row, Turn, best_rate
from benchmarks.gpu.tasks import TASKS
from benchmarks.lib.tables import markdown_table
from benchmarks.lib.timing import Spread
from benchmarks.quality.arms import ARMS
from benchmarks.quality.curve import Arms, Worth, mean_and_error, mean_worth
from benchmarks.quality.plan import TIMED
from benchmarks.quality.rows import Key

HEADS = ("arm", "seeds", "quality", "accuracy, %", "FLOPs / dense", "seconds / dense", "dW skipped", "a run, s",
         "frontier / own, FLOPs", "in seconds")  # fmt: skip

PREAMBLE = """\
Written by `python -m benchmarks.gpu.quality`. Quality is minus the cross-entropy in nats on test data, in float32; ± is
one standard error over seeds. Training is under bfloat16 autocast, convaware's at default options. FLOPs are those of
forward and backward passes, counted. Seconds / dense: of runs that took turns, strides of steps before and after which
the GPU was waited for, without those in which something was compiled; median [quartiles] over all seeds. The shorter
dense run has a schedule shrunk to its steps, and the peak rate, of two, that was better on validation data and another
seed. The last two columns are the cost at which the straight line between the two dense runs reaches convaware's
quality, over its own: above 1 it beats them. ≥: better than both, <: worse than the shorter one; neither is
extrapolated. In seconds: at the price of a FLOP of the dense run that it took turns with.
"""


class Series:
    """One arm of a task, by seed."""

    def __init__(self, rows: dict[Key, Row], turn: Turn, seeds: Sequence[int], tiny: bool) -> None:
        self.arm = turn.arms[0]
        keys = {seed: turn._replace(seed=seed).keys(tiny)[0] for seed in seeds}
        self.rows = {seed: rows[key] for seed, key in keys.items() if key in rows}

    def of(self, column: str, seeds: Sequence[int]) -> np.ndarray:
        return np.array([float(self.rows[seed][column]) for seed in seeds])

    def strides(self, seed: int) -> list[float]:
        return [float(took) for took in self.rows[seed]["step_seconds"].split()]


def figures(ours: Series, dense: Series, shorter: Series) -> tuple[Worth, Worth] | None:
    """In FLOPs and in seconds, over the seeds that all three have; None without any, or where a dense run diverged."""
    seeds = [seed for seed in ours.rows if seed in dense.rows and seed in shorter.rows]
    if not seeds:
        return None
    costs, qualities = (np.stack([arm.of(name, seeds) for arm in (shorter, dense)], 1)
                        for name in ("cost_flops", "quality"))  # fmt: skip
    if not np.isfinite(qualities).all():
        return None
    arms = Arms(costs, qualities, ours.of("cost_flops", seeds), ours.of("quality", seeds))
    price = dense.of("cost_seconds", seeds) / dense.of("cost_flops", seeds)
    timed = arms._replace(costs=costs * price[:, None], cost=ours.of("cost_seconds", seeds))
    return mean_worth(arms), mean_worth(timed)


def table(rows: dict[Key, Row], task: str, seeds: Sequence[int], tiny: bool) -> str:
    """A line for each arm of a task that has rows."""

    def series(arm: str) -> Series:
        return Series(rows, Turn(task, (arm,), 0, "test"), seeds, tiny)

    dense, ours = map(series, TIMED)
    shorter = series(best_rate(rows, task, tiny) or SHORTER)
    found = figures(ours, dense, shorter)
    return markdown_table(
        HEADS,
        (_line(each, dense, found if each is ours else None) for each in (dense, shorter, ours) if each.rows),
    )


def _line(each: Series, dense: Series, found: tuple[Worth, Worth] | None) -> Sequence[object]:
    seeds = list(each.rows)
    both = [seed for seed in seeds if seed in dense.rows]
    cost = each.of("cost_flops", both) / dense.of("cost_flops", both)
    took_turns = each.arm in TIMED and each is not dense
    beside = both if took_turns else []
    pairs = [pair for seed in beside for pair in zip(each.strides(seed), dense.strides(seed), strict=True)
             if not any(map(math.isnan, pair))]  # fmt: skip
    skipped = each.of("skipped_share", seeds).mean()
    return (
        ARMS[each.arm].title, len(seeds), mean_and_error(each.of("quality", seeds), "{:.4f}"),
        mean_and_error(100 * each.of("accuracy", seeds), "{:.2f}"), f"{cost.mean():.3f}" if both else "",
        Spread.of(mine / theirs for mine, theirs in pairs) if pairs else "", f"{skipped:.1%}" if took_turns else "",
        f"{each.of('cost_seconds', seeds).mean():.1f}", *(found or ("", "")),
    )  # fmt: skip


def write_markdown(rows: dict[Key, Row], file: Path, device: str, tasks: Sequence[str], seeds: Sequence[int],
                   missing: Sequence[tuple[str, str, str, str]], tiny: bool) -> str:  # fmt: skip
    """All tables, and (task, arms, seed, why) of what was not run; gives the text."""
    parts = [f"# {device}: quality against cost", PREAMBLE]
    for task in tasks:
        if any(key.task == task and key.split == "test" for key in rows):
            parts += [f"## {TASKS[task].title}{' (tiny)' if tiny else ''}", table(rows, task, seeds, tiny)]
    parts += ["## Not run", markdown_table(("task", "arms", "seed", "why"), missing) if missing else "Nothing missing."]
    parts += [_provenance(rows)] if rows else []
    text = "\n\n".join(part.strip() for part in parts) + "\n"
    file.write_text(text)
    return text


def _provenance(rows: dict[Key, Row]) -> str:
    def values(name: str) -> Iterator[str]:
        yield from sorted({row[name] for row in rows.values()})

    dates = list(values("date"))
    versions = "; ".join(f"{name} {', '.join(values(name))}" for name in ("torch", "cacompile", "python", "device"))
    return f"Rows of {dates[0]} to {dates[-1]}; {versions}."
