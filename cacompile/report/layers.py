"""Pictures of a run layer by layer: which groups were skipped when, what they still won and how fast they moved."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.ticker import LogLocator, NullFormatter

from cacompile.pages.numbers import count, percent, power, scientific

from .charts import over_steps
from .data import RunData, RunFamily
from .svg import KIND, RULE, draw

SHADES = 12
"""Of the heat map, above none."""

_COLUMNS = 80
_CELLS = 6000
"""Most cells of a heat map; with more groups than that leaves room for, each family is one row."""

_LABEL = 20
"""Characters."""


def heat(run: RunData, kind: str) -> str:
    """How often each group of a kind is skipped, layer by layer, over time."""
    families = [family for family in run.families if family.kind == kind]
    labels = short_names([family.name for family in families])
    columns = _columns(run)
    rows = [family.skipped.T for family in families]
    if sum(map(len, rows)) * len(columns) > _CELLS:
        rows = [family.share[None] for family in families]
    band = max(4.0, min(26.0, 560.0 / len(families), max(16.0, 4.0 * max(map(len, rows)))))

    def paint(axes: Axes) -> dict[str, str]:
        end = run.edges[-1]
        for number in range(len(families)):
            axes.add_patch(Rectangle((0, number + 0.03), end, 0.94, facecolor=RULE, alpha=0.4, edgecolor="none"))
        for shade, path in _cells(rows, columns, run.edges).items():
            cells = PathPatch(path, facecolor=KIND, alpha=shade / SHADES, edgecolor="none", linewidth=0)
            cells.set_snap(True)  # neighbours must not show the seam between them
            axes.add_patch(cells)
        tips = {}
        for number, family in enumerate(families):
            target = Rectangle((0, number), end, 1, facecolor=RULE, alpha=0.0, edgecolor="none")
            target.set_gid(f"band{number}")
            axes.add_patch(target)
            tips[f"band{number}"] = _tip(family)
        over_steps(axes, run)
        axes.grid(False)
        axes.spines["bottom"].set_visible(False)
        axes.set_ylim(len(families), 0)
        shown = range(0, len(families), -int(-13.0 // band))
        axes.set_yticks([number + 0.5 for number in shown], [labels[number] for number in shown])
        return tips

    left = 18.0 + 6.9 * max(map(len, labels))
    return draw(44 + band * len(families), paint, f"How often groups of {kind} are skipped", left=left, top=4)


def curves(run: RunData, kind: str, quantity: str) -> str:
    """A line for each family of a kind, pale in the first layer and strong in the last.

    quantity: descent or update_ratio.
    """
    families = [family for family in run.families if family.kind == kind]

    def paint(axes: Axes) -> dict[str, str]:
        tips, drawn = {}, []
        width = 1.6 if len(families) <= 12 else 0.9
        for number, family in enumerate(families):
            values: np.ndarray = getattr(family, quantity)
            values = np.where(values > 0.0, values, np.nan)
            strength = 1.0 if len(families) == 1 else 0.35 + 0.65 * number / (len(families) - 1)
            (line,) = axes.plot(run.history.step, values, color=KIND, alpha=strength, linewidth=width)
            if np.isfinite(values).sum() == 1:
                line.set(marker="o", clip_on=False)
            line.set_gid(f"line{number}")
            tips[f"line{number}"] = _tip(family)
            drawn.append(values[np.isfinite(values)])
        over_steps(axes, run)
        axes.set_yscale("log")
        low, high = _range(np.concatenate(drawn))
        axes.set_ylim(low, high)
        few = high / low < 30.0  # then the powers of ten alone would not do
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,), numticks=8 if few else 6))
        axes.yaxis.set_major_formatter(lambda value, _: scientific(value) if few else power(value))
        axes.yaxis.set_minor_formatter(NullFormatter())
        return tips

    return draw(180, paint, f"{quantity.replace('_', ' ')} of {kind}", top=8)


def _range(values: np.ndarray) -> tuple[float, float]:
    """Of the vertical axis. Where a schedule ends at a rate of zero, the last fall to nothing is left out."""
    if not len(values):
        return 0.1, 1.0
    return 0.5 * float(max(values.min(), 0.1 * np.quantile(values, 0.05))), 2.0 * float(values.max())


def short_names(names: Sequence[str]) -> list[str]:
    """Without the kind at their end and the modules in front that all have, the innermost of those excepted."""
    steps = [(name.rpartition(".")[0] or name).split(".") for name in names]
    alike = [len(set(each)) == 1 for each in zip(*steps)] if len(steps) > 1 else []
    shared = (alike.index(False) if False in alike else len(alike)) - 1
    short = [".".join(each[max(0, shared) :]) for each in steps]
    return [name if len(name) <= _LABEL else f"…{name[1 - _LABEL :]}" for name in short]


def _columns(run: RunData) -> list[np.ndarray]:
    """Measurements that are drawn as one column each."""
    return np.array_split(np.arange(run.measurements), min(_COLUMNS, run.measurements))


def _cells(rows: Sequence[np.ndarray], columns: Sequence[np.ndarray], edges: np.ndarray) -> dict[int, Path]:
    """Shade -> all cells of it. rows: for each family [its rows, P]; its band is one high."""
    left = np.array([edges[column[0]] for column in columns])
    right = np.append(left[1:], edges[-1])
    vertices: dict[int, list[tuple[float, float]]] = {}
    for number, family in enumerate(rows):
        means = np.stack([np.nan_to_num(family[:, column]).mean(1) for column in columns], 1)
        height = 0.94 / len(family)
        for row, shades in enumerate(np.rint(SHADES * means).astype(int)):
            top = number + 0.03 + row * height
            # neighbours of one shade are one cell
            starts = np.flatnonzero(np.diff(shades, prepend=-1))
            for start, stop in zip(starts, np.append(starts[1:], len(shades))):
                if shades[start] > 0:
                    x0, x1 = left[start], right[stop - 1]
                    corners = [(x0, top), (x1, top), (x1, top + height), (x0, top + height), (x0, top)]
                    vertices.setdefault(int(shades[start]), []).extend(corners)
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    return {shade: Path(points, codes * (len(points) // 5)) for shade, points in vertices.items()}


def _tip(family: RunFamily) -> str:
    return (
        f"{family.name}: {count(family.skipped.shape[1], 'group')}\n"
        f"skipped in {percent(family.share[-1])} of the steps now, {percent(family.mean)} on average\n"
        f"descent {scientific(family.descent[-1])}, update ratio {scientific(family.update_ratio[-1])}"
    )
