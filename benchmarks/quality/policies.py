"""Ways to choose the groups, to spread them over steps and to fill in what is missing, at the same skipped share.

    python -m benchmarks.quality.policies [--tasks vit,gpt] [--seeds 100,101] [--smoke]
    python -m benchmarks.quality.policies --tasks minilm-long --share 0.75 --start 0.1 \\
        --variants "uniform, each group on its own;uniform, parts of families;uniform, whole families"

    python -m benchmarks.quality.policies --tasks vit64 --start 0.1 --stop 0.6 --variants "uniform, whole families"

Each variant skips half of the dW FLOPs (--share) from the middle of the run on (--start) to its end (--stop) and trains
otherwise as `benchmarks.quality` does.
Seeds and data (`split="valid"`) are not those that it reports on. Rows go to policies.csv; runs that are there already
are not repeated.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tabulate import tabulate

from benchmarks.lib.rows import RESULTS
from benchmarks.quality.plan import Settings
from benchmarks.quality.run import Arm, Control, Run, train
from benchmarks.quality.signal import Watch
from benchmarks.quality.task import Task
from cacompile.controller import estimate
from cacompile.controller.monitor import sum_groups
from cacompile.controller.optimizers import descent, statistic_of
from cacompile.controller.turns import next_turns, take_turns
from cacompile.state.groups import in_parts

RUN = ("task", "variant", "start", "stop", "share", "seed", "steps")
COLUMNS = (*RUN, "quality", "accuracy", "skipped_share", "torch")
LONGEST, PARTS = 5, 4
"""Most steps from one turn of a group to the next; neighbouring parts of a family that take turns of their own."""

Sums = dict[str, np.ndarray]


def statistics(run: Run) -> Sums:
    """What AdamW knows of each group: float [groups]."""
    index = run.session.index
    found: dict[str, list[np.ndarray]] = {"mean": [], "square": [], "descent": []}
    for state in index.params:
        kept = statistic_of(run.optimizer, run.optimizer.param_groups[0], state.param, state.step)
        (mean, square), (beta1, beta2, _), count = kept.tensors, kept.factors, float(kept.step)
        mean, square = mean / (1 - beta1**count), square / (1 - beta2**count)
        for name, values in (("mean", mean**2), ("square", square), ("descent", descent(kept))):
            found[name].append(sum_groups(values, state).numpy())
    return {name: index.sum(np.concatenate(parts)) for name, parts in found.items()}


RULES: dict[str, Callable[[Sums, np.ndarray], np.ndarray]] = {
    "uniform": lambda sums, flops: flops,
    "gradient norm": lambda sums, flops: sums["square"],
    "signal to noise": lambda sums, flops: flops * sums["mean"] / sums["square"],
    "variance": lambda sums, flops: np.maximum(sums["square"] - sums["mean"], 0.0),
    "descent": lambda sums, flops: sums["descent"],
    "signal": lambda sums, flops: sums["signal"],
}
"""How much a group's gradient is worth, which its FLOPs are held against."""


def keep_for(worth: np.ndarray, flops: np.ndarray, share: float) -> np.ndarray:
    """Probabilities like the root of worth per FLOP, between 1 / LONGEST and 1, that skip this share of the FLOPs."""
    root = np.sqrt(worth / flops)
    low, high = 0.0, 1e6 / root[root > 0].min()
    for _ in range(100):
        middle = (low + high) / 2
        keep = np.clip(middle * root, 1 / LONGEST, 1.0)
        low, high = (middle, high) if ((1 - keep) * flops).sum() > share * flops.sum() else (low, middle)
    return np.clip(high * root, 1 / LONGEST, 1.0)


def quarters(family: np.ndarray) -> np.ndarray:
    """int [groups]: equal for those of one of PARTS parts of a family. family: int [groups]."""
    return in_parts(family, np.minimum(np.bincount(family), PARTS))


TOGETHER: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "families": lambda family: family, "parts": quarters, "all": np.zeros_like,
}  # fmt: skip
"""Draws in which groups take their turn together -> equal numbers for those that do, of their families' numbers."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    name: str
    rule: str = "descent"
    draw: str = "turns"
    """turns: at equal distances, each group on its own; families, parts: together, in PARTS parts of a family; all: all
    groups in the same steps; independent: a coin for each step; best: the most worthy ones, always."""
    shared: bool = False
    """Whether groups of one family share what they are worth per FLOP, as scores of single groups are noisy."""
    power: float = 0.5
    """A group computed after k steps has its gradient's distance from the estimate weighted by k to this power."""
    estimate: str = "momentum"
    unbiased: bool = False
    """Whether gradients are multiplied by k, as zeros stand for the k - 1 that are missing."""


VARIANTS = (
    *(Variant(name=f"choice by {rule}", rule=rule) for rule in RULES if rule != "uniform"),
    Variant(name="the best half by descent, no draw", draw="best"),
    Variant(name="choice by descent, shared in families", shared=True),
    Variant(name="choice by signal, shared in families", rule="signal", shared=True),
    Variant(name="uniform, each group on its own", rule="uniform"),
    Variant(name="uniform, parts of families", rule="uniform", draw="parts"),
    Variant(name="uniform, whole families", rule="uniform", draw="families"),
    Variant(name="uniform, all in the same steps", rule="uniform", draw="all"),
    Variant(name="uniform, independent draws", rule="uniform", draw="independent"),
    Variant(name="uniform, weight 1", rule="uniform", power=0.0),
    Variant(name="uniform, weight k (control variate)", rule="uniform", power=1.0),
    Variant(name="uniform, zeros", rule="uniform", estimate="zeros"),
    Variant(name="uniform, zeros, k times what is computed (1/p)", rule="uniform", estimate="zeros", unbiased=True),
)


class Chosen(Control):
    """Pins the mask of one variant before each step."""

    def __init__(self, run: Run, variant: Variant, share: float, start: float, stop: float) -> None:
        super().__init__(run)
        self.share, self.start, self.stop = share, round(start * run.steps), round(stop * run.steps)
        self.variant, self.random = variant, np.random.default_rng(run.seed)
        self.keep = self.phase = self.age = np.zeros(0)
        self.times = np.zeros(0)
        self.watch = Watch(run) if variant.rule == "signal" else None
        if variant.unbiased:
            run.optimizer.register_step_pre_hook(lambda *_: self._multiply())

    def _multiply(self) -> None:
        """Runs after the hook that fills in what was skipped."""
        if len(self.times):
            index = self.run.session.index
            for state, times in zip(index.params, index.split(self.times)):
                grad = state.param.grad.movedim(state.partition.dim, 0)
                for rows, by in zip(grad.split(state.partition.block), times.tolist()):
                    rows.mul_(by)

    def before_step(self) -> None:
        run, step = self.run, self.run.step_number
        if not self.start <= step < self.stop:
            if step in (1, self.stop):
                run.session.pin(keep=1.0)
                self.times = np.zeros(0)
            return
        index = run.session.index
        flops = index.sum(np.concatenate([state.flops for state in index.params]))
        if (step - self.start) % 10 == 0:
            sums = {} if self.variant.rule == "uniform" else statistics(run)
            if self.watch is not None:
                sums["signal"] = self.watch.found.sum((0, 1))
            worth = RULES[self.variant.rule](sums, flops)
            if self.variant.shared:
                worth = flops * (np.bincount(index.family, worth) / np.bincount(index.family, flops))[index.family]
            worth = np.maximum(worth, 1e-6 * worth.max())  # noise may make a sum of signals negative
            self.keep = keep_for(worth, flops, self.share)
            if self.variant.draw == "best":
                order = np.argsort(worth / flops)
                self.keep = np.ones(len(flops))
                short = np.abs(np.cumsum([0.0, *flops[order]]) - self.share * flops.sum())
                self.keep[order[: int(short.argmin())]] = 0.0
        together = TOGETHER.get(self.variant.draw)
        if len(self.phase) == 0:
            self.age = np.zeros(len(flops))
            self.phase = self.random.permutation(len(flops)) / len(flops) if together is None else self.age - 1.0
        if together is not None:
            on, self.phase = next_turns(self.keep, self.phase, together(index.family), index.role, (run.seed, step))
        elif self.variant.draw == "independent":
            on = (self.random.random(len(flops)) < self.keep) | (self.keep >= 1.0)
        else:
            on, self.phase = take_turns(self.keep, self.phase)
        self.times = np.where(on, self.age + 1.0, 1.0)
        self.age = np.where(on, 0.0, self.age + 1.0)
        run.session.pin(mask=on)


def weighted(power: float) -> Callable[..., np.ndarray]:
    """In place of `estimate.weights`."""

    def weights(skipped: np.ndarray, age: np.ndarray) -> np.ndarray:
        return np.where(skipped, 0.0, (age + 1.0) ** power).astype(np.float32)

    return weights


def measure(task: Task, variant: Variant, seed: int, share: float, start: float, stop: float) -> dict[str, Any]:
    """One run; a row of policies.csv."""
    plain = estimate.weights
    estimate.weights = weighted(variant.power)
    try:
        arm = Arm(name=variant.name, title=variant.name, backend="convaware",
                  options={"seed": 0, "estimate": variant.estimate},
                  control=lambda run: Chosen(run, variant, share, start, stop))  # fmt: skip
        run = Run(task, arm, seed)
        train([run])
    finally:
        estimate.weights = plain
    found = run.result("valid")
    return {"task": task.name, "variant": variant.name, "start": start, "stop": stop, "share": share, "seed": seed,
            "torch": torch.__version__, **{name: found[name] for name in COLUMNS if name in found}}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="vit")
    parser.add_argument("--seeds", default="100,101")
    parser.add_argument("--share", type=float, default=0.5, help="of dW FLOPs that is skipped (default: %(default)s)")
    parser.add_argument("--start", type=float, default=0.5, help="from which part of the run on (default: %(default)s)")
    parser.add_argument("--stop", type=float, default=1.0, help="up to which (default: %(default)s)")
    parser.add_argument("--variants", help="names, separated by ; (default: all)")
    parser.add_argument("--steps-scale", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes; shows that it runs, no more")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 1000
    args.out.mkdir(parents=True, exist_ok=True)
    file, rows = args.out / "policies.csv", []
    if file.exists():
        with open(file, newline="") as lines:
            rows = list(csv.DictReader(lines))
    settings = Settings(out=args.out, split="valid", scale=args.steps_scale, smoke=args.smoke)
    wanted = args.variants.split(";") if args.variants else [variant.name for variant in VARIANTS]
    if wrong := set(wanted) - {variant.name for variant in VARIANTS}:
        parser.error(f"unknown variants: {', '.join(sorted(wrong))}")
    for task in map(settings.task, args.tasks.split(",")):
        for variant in (variant for variant in VARIANTS if variant.name in wanted):
            for seed in map(int, args.seeds.split(",")):
                here = tuple(map(str, (task.name, variant.name, args.start, args.stop, args.share, seed, task.steps)))
                if any(tuple(row[name] for name in RUN) == here for row in rows):
                    continue
                row = measure(task, variant, seed, args.share, args.start, args.stop)
                rows.append({name: str(row[name]) for name in COLUMNS})
                with open(file, "w", newline="") as lines:
                    out = csv.DictWriter(lines, COLUMNS, lineterminator="\n")
                    out.writeheader()
                    out.writerows(rows)
                print(f"{task.name}: {variant.name}, seed {seed}: {row['quality']:.4f}", file=sys.stderr, flush=True)
    print(table(rows))


def table(rows: Sequence[dict[str, str]]) -> str:
    """Markdown: a row for each variant of each task, best first; the mean over seeds and its standard error."""
    frame = pd.DataFrame(rows).astype({"quality": float, "skipped_share": float, "start": float, "stop": float})
    names = ["task", "start", "stop", "share", "variant"]
    found = frame.groupby(names, sort=False).agg(
        quality=("quality", "mean"), error=("quality", "sem"), skipped=("skipped_share", "mean"), seeds=("seed", "size")
    )
    found = found.reset_index().sort_values([*names[:4], "quality"], ascending=[True] * 4 + [False])
    lines = found[["task", "start", "stop", "variant", "quality", "error", "skipped", "seeds"]].to_numpy().tolist()
    heads = ["task", "from", "to", "variant", "quality", "standard error", "dW skipped", "seeds"]
    return tabulate(lines, heads, tablefmt="github", floatfmt=("", ".0%", ".0%", "", ".4f", ".4f", ".1%", ""))


if __name__ == "__main__":
    main()
