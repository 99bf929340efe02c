"""What is there to win by choosing groups: how much of their gradients is signal, and what a perfect choice would save.

    python -m benchmarks.quality.signal [--tasks minilm-long,transfer] [--seeds 100] [--smoke]

Runs are dense and those of `benchmarks.quality`. The expected descent that the policy reads counts the optimizer's mean
of gradients twice, with the noise that is in it. Here, in each step, the gradient is held against the mean of all those
before it, with whose noise it shares nothing: <gradient, update that the mean asks for>, summed over a group. What is
read and not found so is noise, or a way there and back.

From it follows what leaving out the dW of some groups for good could be worth at best, if all that a run wins were what
its steps win to first order: the share of descent that is kept over the share of the step's FLOPs. The groups that make
it most are chosen by the even steps and valued by the odd ones, so that noise does not look like a choice. As far as
the ranks of the two agree ("of even and odd") a run could tell by itself which groups have more to win.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from benchmarks.lib.rows import RESULTS
from benchmarks.quality.plan import Settings
from benchmarks.quality.rows import stamp
from benchmarks.quality.run import Arm, Control, Run, train
from benchmarks.quality.task import Task
from cacompile.controller.monitor import settings_by_param, sum_groups
from cacompile.controller.optimizers import descent, statistic_of
from cacompile.controller.optimizers.base import Statistic, wide
from cacompile.controller.weigh import step_flops

FIFTHS = 5
"""Parts of a run whose signal is told apart."""

FILE = "signal.csv"


def foreseen(gradient: Tensor, statistic: Statistic) -> Tensor:
    """Of each element, what a step along the mean of the gradients so far wins by this one, per unit of learning rate.

    gradient: float, any shape; statistic: of Adam's family or SGD with momentum, before this gradient is in it.
    """
    if len(statistic.tensors) == 1:
        return wide(gradient) * wide(statistic.tensors[0])  # a sum of gradients, which is the update
    (mean, square), (beta1, beta2, eps), step = statistic.tensors, statistic.factors, statistic.step
    return wide(gradient) * wide(mean) / (1.0 - beta1**step) / ((wide(square) / (1.0 - beta2**step)).sqrt() + eps)


class Watch(Control):
    """Adds up what each group wins while it is computed, before every step of the optimizer."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.found = np.zeros((FIFTHS, 2, 0))
        """float [fifths, even and odd steps, groups]: signal."""
        self.read = np.zeros((FIFTHS, 0))
        """float [fifths, groups]: what the policy would have read."""
        run.optimizer.register_step_pre_hook(lambda *_: self._look())

    @torch.no_grad()
    def _look(self) -> None:
        run, step = self.run, self.run.step_number
        index = run.session.index
        settings = settings_by_param(run.optimizer)
        found, read = [], []
        for state in index.params:
            mine = settings.get(id(state.param), {})
            kept = statistic_of(run.optimizer, mine, state.param, state.step) if mine else None
            if kept is None or kept.rule is not None or state.param.grad is None:
                found.append(np.zeros(state.blocks))
                read.append(np.zeros(state.blocks))
                continue
            for values, sums in ((foreseen(state.param.grad, kept), found), (descent(kept), read)):
                sums.append(np.where(state.skipped, 0.0, sum_groups(values, state).numpy() * mine["lr"]))
        if step and found:
            if not self.found.shape[-1]:
                self.found, self.read = (np.zeros((*a.shape[:-1], len(index.all))) for a in (self.found, self.read))
            fifth = step * FIFTHS // run.steps
            self.found[fifth, step % 2] += index.sum(np.concatenate(found))
            self.read[fifth] += index.sum(np.concatenate(read))


@dataclass(frozen=True)
class Attainable:
    """What leaving out the dW of a fixed choice of groups could be worth."""

    figure: float
    """Share of descent that is kept over the share of FLOPs that is spent.

    Below 1 where what one half of the steps chose loses by the other.
    """
    left_out: float
    """Share of dW FLOPs."""


def attainable(chosen_by: np.ndarray, valued_by: np.ndarray, flops: np.ndarray, whole: float) -> Attainable:
    """The choice of groups that is best by one measurement of their descents, valued by another.

    chosen_by, valued_by: float [groups]; flops: float [groups], of dW; whole: of a step. Where the first have no
    descent in all nothing is left out, where the second have none the figure is NaN.
    """
    some = flops > 0.0
    order = np.flatnonzero(some)[np.argsort(chosen_by[some] / flops[some], kind="stable")]
    saved = np.cumsum(np.r_[0.0, flops[order]])

    def figures(descents: np.ndarray) -> np.ndarray:
        won = descents.sum() if descents.sum() > 0.0 else np.nan
        return (1.0 - np.cumsum(np.r_[0.0, descents[order]]) / won) / (1.0 - saved / whole)

    best = int(np.argmax(figures(chosen_by)))
    return Attainable(float(figures(valued_by)[best]), float(saved[best] / flops.sum()))


def measure(task: Task, seed: int) -> dict[str, Any]:
    """One dense run; a row of signal.csv."""
    arm = Arm(name="signal", title="dense", backend="convaware", options={"tolerance": 0.0}, control=Watch)
    run = Run(task, arm, seed)
    watch = run.control
    assert isinstance(watch, Watch)
    train([run])
    index = run.session.index
    flops = index.sum(np.concatenate([state.flops for state in index.params]))
    whole = step_flops(index.params)
    assert whole is not None
    even, odd = watch.found.sum(0)
    both = attainable(even, odd, flops, whole), attainable(odd, even, flops, whole)
    some = flops > 0.0
    columns = {"found": even + odd, "read": watch.read.sum(0), "even": even, "odd": odd}
    order = pd.DataFrame(columns)[some].div(flops[some], axis=0).corr("spearman")
    parts = watch.found.sum((1, 2)) / watch.read.sum(1)
    return {
        "task": task.name, "seed": seed, "steps": task.steps, "groups": int(some.sum()),
        **{f"signal {fifth + 1}": part for fifth, part in enumerate(parts)},
        "rank correlation": order.loc["found", "read"], "of even and odd": order.loc["even", "odd"],
        "attainable": np.mean([each.figure for each in both]), "left out": np.mean([each.left_out for each in both]),
        **stamp(),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="minilm-long,transfer,vit-long,resnet-long,gpt-long")
    parser.add_argument("--seeds", default="100")
    parser.add_argument("--steps-scale", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder")
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes; shows that it runs, no more")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 1000
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / FILE
    rows = pd.read_csv(file).to_dict("records") if file.exists() else []
    settings = Settings(out=args.out, split="valid", scale=args.steps_scale, smoke=args.smoke)
    for task in map(settings.task, args.tasks.split(",")):
        for seed in map(int, args.seeds.split(",")):
            if any((row["task"], row["seed"], row["steps"]) == (task.name, seed, task.steps) for row in rows):
                continue
            rows.append(measure(task, seed))
            pd.DataFrame(rows).to_csv(file, index=False, float_format="%.5g")
            print(f"{task.name}, seed {seed}: {rows[-1]['attainable']:.3f}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
