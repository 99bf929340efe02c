"""A run as rows of a CSV file, and as events for TensorBoard."""

from __future__ import annotations

import csv
import math
import time
from pathlib import Path

import numpy as np

from cacompile.pages.libraries import library

from .data import RunData

RUN_COLUMNS = ("step", "seconds", "step_flops", "dw_flops", "dw_flops_saved", "backwards", "backwards_masked",
               "groups_skipped")  # fmt: skip
GROUP_COLUMNS = ("family", "kind", "group", "keep", "descent", "update_ratio")


def write_csv(run: RunData, path: Path) -> None:
    """A row for each measurement and group; the first columns are the whole run's so far. Empty where unknown."""
    kept = run.history
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*RUN_COLUMNS, *GROUP_COLUMNS])
        for i, step in enumerate(kept.step.tolist()):
            numbers = (kept.seconds, kept.step_flops, kept.total, kept.saved, kept.backwards, kept.masked, kept.skipped)
            whole = [step, *(_text(float(values[i])) for values in numbers)]
            for g, group in enumerate(kept.groups):
                family = int(kept.family[g])
                values = (float(table[i, g]) for table in (kept.keep, kept.descent, kept.update_ratio))
                writer.writerow([*whole, kept.families[family], kept.kinds[family], group, *map(_text, values)])


def _text(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.9g}" if value % 1.0 else f"{value:.0f}"


def write_events(run: RunData, folder: Path) -> None:
    """Scalars of the run and of each family, and histograms over all groups, at each measurement."""
    writer = library("torch.utils.tensorboard", "tensorboard").SummaryWriter(log_dir=str(folder))
    kept = run.history
    began = time.time() - run.seconds
    scalars = {
        "run/step share skipped since the last measurement": run.step_shares,
        "run/step share skipped so far": run.step_cumulative,
        "run/dW share skipped since the last measurement": run.shares,
        "run/dW share skipped so far": run.cumulative,
        "run/dW FLOPs saved": kept.saved,
        "run/share of backwards masked": run.masked_shares,
        "run/groups skipped": kept.skipped,
        "run/seconds per step": run.step_seconds,
    }
    for family in run.families:
        scalars[f"skipped/{family.name}"] = family.share
        scalars[f"descent/{family.name}"] = family.descent
        scalars[f"update ratio/{family.name}"] = family.update_ratio
    tables = {"keep": kept.keep, "log10 descent": kept.descent, "log10 update ratio": kept.update_ratio}
    with writer:
        for step, loss in zip(*(values.tolist() for values in run.losses)):
            writer.add_scalar("run/loss", loss, step)
        for i, (step, seconds) in enumerate(zip(kept.step.tolist(), kept.seconds.tolist())):
            for tag, values in scalars.items():
                if np.isfinite(values[i]):
                    writer.add_scalar(tag, float(values[i]), step, walltime=began + seconds)
            for tag, table in tables.items():
                known = table[i][np.isfinite(table[i]) & (table[i] > 0.0)]
                if len(known):
                    known = np.log10(known) if tag.startswith("log10") else known
                    writer.add_histogram(f"groups/{tag}", known, step, walltime=began + seconds)
