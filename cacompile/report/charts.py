"""Pictures of a whole run: what was skipped and saved, which backward ran, how long a step took."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from cacompile.pages.numbers import amount, duration, percent

from .data import RunData
from .svg import INK, KIND, MUTED, RULE, draw

DASHES = (0, (4, 3))


def knows_steps(run: RunData) -> bool:
    """Whether the FLOPs of whole steps are known at all measurements; older states have those of dW alone."""
    return bool(np.isfinite(run.history.step_flops).all())


def share(run: RunData) -> str:
    """Share of the steps that was skipped, or of dW, measurement by measurement and so far."""
    whole = knows_steps(run)
    each, so_far = (run.step_shares, run.step_cumulative) if whole else (run.shares, run.cumulative)

    def paint(axes: Axes) -> None:
        _stairs(axes, run, each, fill=True, facecolor=KIND, alpha=0.28, edgecolor="none")
        _stairs(axes, run, each, color=KIND, linewidth=1.4, baseline=None, label="since the last one")
        axes.plot(run.history.step, so_far, color=INK, label="so far", **_dot(run.measurements))
        over_steps(axes, run)
        _scale(axes, "{:.0%}".format, max(0.02, min(1.0, 1.15 * float(each.max()))))
        _warm_up(axes, run)
        legend(axes)

    what = f"{percent(run.whole_share)} of the steps' FLOPs" if whole else f"{percent(run.share)} of dW FLOPs"
    return draw(220, paint, f"{what} were skipped in all")


def loss(run: RunData) -> str:
    """The loss, where somebody has told it."""
    steps, values = run.losses

    def paint(axes: Axes) -> None:
        axes.plot(steps, values, color=INK, linewidth=1.4, **_dot(len(steps)))
        over_steps(axes, run)
        axes.set_xlim(0, max(int(steps[-1]), run.edges[-1]))
        _scale(axes, "{:.3g}".format)

    return draw(190, paint, f"Loss, {values[-1]:.4g} at the end")


def flops(run: RunData) -> str:
    """dW FLOPs so far, those of a dense run and those spent."""

    def paint(axes: Axes) -> None:
        steps = [0, *run.history.step]
        dense, spent = np.append(0, run.history.total), np.append(0, run.history.total - run.history.saved)
        axes.plot(steps, dense, color=MUTED, linestyle=DASHES, linewidth=1.4, label="a dense run's")
        axes.plot(steps, spent, color=KIND, label="computed")
        axes.fill_between(steps, spent, dense, facecolor=KIND, alpha=0.28, edgecolor="none", label="saved")
        over_steps(axes, run)
        _scale(axes, amount, 1.06 * max(1.0, dense[-1]))
        legend(axes)

    return draw(220, paint, f"{amount(run.saved)} of {amount(run.total)} dW FLOPs saved")


def versions(run: RunData) -> str:
    """Which version of the backward ran."""

    def paint(axes: Axes) -> None:
        every = np.ones(run.measurements)
        _stairs(axes, run, run.masked_shares, fill=True, facecolor=KIND, alpha=0.6, edgecolor="none", label="masked")
        _stairs(axes, run, every, baseline=run.masked_shares, fill=True, facecolor=MUTED, alpha=0.22, edgecolor="none",
                label="dense: Inductor's own")  # fmt: skip
        over_steps(axes, run)
        _scale(axes, "{:.0%}".format, 1.0)
        axes.grid(False)
        legend(axes)

    return draw(190, paint, "Share of backward passes that ran the masked version")


def times(run: RunData) -> str:
    """Wall clock of a step."""

    def paint(axes: Axes) -> None:
        known = np.isfinite(run.step_seconds)
        steps, seconds = run.history.step[known], run.step_seconds[known]
        median = float(np.median(seconds))
        axes.plot(steps, seconds, color=KIND, linewidth=1.4, **_dot(len(steps)), label="since the last one")
        axes.axhline(median, color=INK, linestyle=DASHES, linewidth=1.2, label=f"median {duration(median)}")
        over_steps(axes, run)
        # compiling takes as long as many steps: what is rare may leave the picture, so that the usual can be seen
        _scale(axes, duration, 1.1 * min(float(seconds.max()), 3.0 * median))
        legend(axes)

    return draw(190, paint, "Wall clock of one optimizer step")


def over_steps(axes: Axes, run: RunData) -> None:
    """The horizontal axis of every picture."""
    axes.set_xlim(0, run.edges[-1])
    axes.set_xlabel("optimizer steps")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def legend(axes: Axes) -> None:
    """In one row above the picture."""
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4, borderaxespad=0.4, borderpad=0.2,
                handlelength=1.2, handletextpad=0.5, columnspacing=1.0)  # fmt: skip


def _scale(axes: Axes, text: Callable[[float], str], top: float | None = None) -> None:
    """The vertical axis, from 0 to `top` where that is given."""
    if top is not None:
        axes.set_ylim(0, top)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(lambda value, _: text(value))


def _stairs(axes: Axes, run: RunData, values: np.ndarray, **options: Any) -> None:
    """Values that hold from the measurement before to each."""
    axes.stairs(values, [0, *run.history.step], **options)


def _warm_up(axes: Axes, run: RunData) -> None:
    warm = min(run.about.get("options", {}).get("warmup_steps", 0), run.edges[-1])
    if warm > 0:
        axes.axvspan(0, warm, facecolor=RULE, alpha=0.6, edgecolor="none", zorder=0)


def _dot(points: int) -> dict[str, Any]:
    """One point makes no line."""
    return {"marker": "o", "clip_on": False} if points == 1 else {}
