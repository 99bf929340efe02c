"""The peak learning rate of each dense run: the best of three, chosen on validation data and seeds not reported."""

from __future__ import annotations

import pandas as pd

from benchmarks.quality.arms import RATES, rated


def tuned(rows: pd.DataFrame, task: str, rung: str, steps: int) -> str:
    """The arm that trains as `rung` at its best rate, by the mean over seeds that have all rates; `rung` if none has.

    rows: of quality.csv; steps: of the rung.
    """
    names = [rated(rung, rate) for rate in RATES]
    mine = rows[(rows["task"] == task) & (rows["split"] == "valid") & (rows["steps"] == steps)]
    by_seed = mine.pivot_table(index="seed", columns="arm", values="quality").reindex(columns=names).dropna()
    return rung if by_seed.empty else str(by_seed.mean().idxmax())
