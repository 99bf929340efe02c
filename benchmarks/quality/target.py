"""Time to a fixed target: what the full dense run reaches on the mean, less one standard error. A miss is infinite."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from benchmarks.quality.curve import standard_error
from benchmarks.quality.plan import TIMED


def of_looks(looks: pd.DataFrame, arm: str, seeds: Sequence[int]) -> list[pd.DataFrame]:
    """A frame with a row for each seed, for each step at which all these seeds were looked at."""
    mine = looks[looks["arm"] == arm]
    frames = [each.set_index("seed") for _, each in mine.groupby("step")]
    return [frame for frame in frames if set(seeds) <= set(frame.index)]


def to_target(looks: pd.DataFrame, rows: pd.DataFrame) -> dict[str, tuple[float, float, int, int]]:
    """Arm -> (FLOPs, seconds, misses, seeds): medians over seeds, as shares of the full dense run of the same seed.

    Over the seeds that all arms were run from which were run at all; the target is of all of dense's.

    looks, rows: of one task; what a run has at its end is in rows.
    """
    columns = ["arm", "seed", "cost_flops", "cost_seconds", "quality"]
    if looks.empty or rows.empty:
        return {}
    ends = rows[rows["arm"].isin(TIMED)]
    dense = ends[ends["arm"] == "dense"].set_index("seed")
    error = standard_error(dense["quality"].to_numpy(float))
    target = float(dense["quality"].mean()) - (0.0 if np.isnan(error) else error)
    seen, found = pd.concat([looks[columns], ends[columns]], ignore_index=True), {}
    of_arm = {arm: set(each["seed"]) & set(dense.index) for arm, each in seen.groupby("arm")}
    run = [arm for arm in TIMED if of_arm.get(arm)]
    seeds = sorted(set.intersection(*(of_arm[arm] for arm in run))) if run else []
    for arm in run if seeds else ():
        mine = seen[seen["arm"] == arm]
        costs = []
        for seed in seeds:
            there = mine[(mine["seed"] == seed) & (mine["quality"] >= target)]
            full = dense.loc[seed]
            first = there.sort_values("cost_flops").head(1)
            costs.append([float(first[name].iloc[0] / full[name]) if len(first) else np.inf
                          for name in ("cost_flops", "cost_seconds")])  # fmt: skip
        flops, seconds = np.median(costs, axis=0)
        found[arm] = float(flops), float(seconds), int(np.isinf([each[0] for each in costs]).sum()), len(seeds)
    return found
