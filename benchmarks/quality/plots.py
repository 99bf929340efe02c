"""Pictures of `benchmarks.quality`: quality against cost, and how much was skipped when."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np

from benchmarks.quality.arms import DENSE
from benchmarks.quality.curve import frontier, standard_error

if TYPE_CHECKING:
    from benchmarks.quality.report import Found

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GREY = "#555555"
LOOKS = {  # colours of Okabe and Ito, which the colour-blind can tell apart
    "convaware": ("#D55E00", "*", 190), "tolerant": ("#E69F00", "*", 110), "random": ("#0072B2", "o", 55),
    "static": ("#009E73", "s", 50), "grades": ("#CC79A7", "^", 65), "grades-on": ("#CC79A7", "v", 65),
    "gradskip": ("#56B4E9", "D", 50),
}  # fmt: skip


def draw_curves(file: Path, panels: Mapping[str, Sequence[Found]], titles: Mapping[str, str]) -> None:
    """One panel for each task: the dense runs as a curve, all other arms as points."""
    figure, axes = _grid(len(panels), height=3.7)
    shown: dict[str, Any] = {}
    for axis, (task, found) in zip(axes, panels.items(), strict=False):
        dense = sorted((f for f in found if f.arm in DENSE), key=lambda f: f.cost.mean())
        cost, quality = ([float(getattr(f, name).mean()) for f in dense] for name in ("cost", "quality"))
        axis.plot(*frontier(cost, quality), color=GREY, lw=1, alpha=0.6)
        error = [_error(f.quality) for f in dense]
        shown["dense"] = axis.errorbar(cost, quality, error, fmt=".", color=GREY, capsize=2)
        for f in (f for f in found if f.arm in LOOKS):
            color, marker, size = LOOKS[f.arm]
            x, y = f.cost.mean(), f.quality.mean()
            axis.errorbar(x, y, _error(f.quality), _error(f.cost), fmt="none", color=color, capsize=2, zorder=3)
            shown[f.arm] = axis.scatter(x, y, s=size, color=color, marker=marker, edgecolor="white", lw=0.5, zorder=4)
        axis.set_title(_wrapped(titles[task]), fontsize=9)
        axis.margins(0.08)
    figure.supxlabel("training FLOPs / those of the full dense run", fontsize=10)
    figure.supylabel("minus cross-entropy, nats", fontsize=10)
    figure.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=len(shown), frameon=False, fontsize=9)
    _save(figure, file)


def draw_profiles(file: Path, shares: Mapping[str, Sequence[Sequence[float]]], titles: Mapping[str, str]) -> None:
    """One panel for each task: share of the dW FLOPs that convaware skipped in each step, a line for each seed."""
    figure, axes = _grid(len(shares), height=2.6)
    for axis, (task, each) in zip(axes, shares.items(), strict=False):
        for seed in each:
            axis.plot(100 * np.asarray(seed), color=LOOKS["convaware"][0], lw=0.8, alpha=0.45)
        if each:
            axis.plot(100 * np.mean(each, axis=0), color="black", lw=1)
        axis.set_title(_wrapped(titles[task]), fontsize=9)
        axis.set_ylim(-3, 103)
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("dW FLOPs skipped, %", fontsize=10)
    _save(figure, file)


def _error(values: np.ndarray) -> float:
    error = standard_error(values)
    return 0.0 if math.isnan(error) else error


def _grid(panels: int, height: float) -> tuple[Any, list[Any]]:
    columns = min(2, panels)
    rows = math.ceil(panels / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, height * rows + 0.5), squeeze=False,
                                layout="constrained")  # fmt: skip
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
        axis.tick_params(labelsize=8)
    for axis in axes.flat[panels:]:
        axis.set_visible(False)
    return figure, list(axes.flat)


def _wrapped(title: str) -> str:
    head, middle, tail = title.partition(" on ")
    return f"{head}\n{middle.strip()} {tail}"


def _save(figure: Any, file: Path) -> None:
    with matplotlib.rc_context({"svg.hashsalt": "quality"}):  # the same picture, the same file
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, dpi=140)
    plt.close(figure)
