"""A run as tables: its families of groups, what stays dense, which backward ran, and the options."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np

from cacompile.config import Config
from cacompile.pages.numbers import percent, scientific
from cacompile.pages.tables import Column, Names, Some, Table
from cacompile.sessions.about import plain

from .correlations import correlations
from .data import RunData

CHANGES = 12
"""Of versions, that are told one by one."""

_BARS = " ▁▂▃▄▅▆▇█"
_WIDTH = 24


def families(run: RunData) -> Table:
    """A row for each family, with its newest measurement."""
    flops = sum(family.flops for family in run.families) or 1.0
    columns = (
        Column("family", lambda family: Names([family.name]), wraps=True),
        Column("kind", lambda family: family.kind, places=("page",)),
        Column("groups", lambda family: str(family.skipped.shape[1]), "number"),
        Column("dW FLOPs", lambda family: percent(family.flops / flops), "number"),
        Column("skipped, over time", lambda family: spark(family.share), places=("terminal",)),
        Column("skipped, mean", lambda family: percent(family.mean), "number", ("page",)),
        Column("skipped now", lambda family: percent(family.share[-1]), "number"),
        Column("descent", lambda family: scientific(family.descent[-1]), "number"),
        Column("update ratio", lambda family: scientific(family.update_ratio[-1]), "number"),
        Column("why not", lambda family: run.why(family.name), wraps=True),
    )
    steps = f"steps {run.history.step[0]} to {run.history.step[-1]}" if run.measurements else "no step"
    return Table(columns, tuple(run.families), f"Families, {steps}")


def reasons(run: RunData) -> Table:
    """A row for each reason for which parameters stay dense."""
    columns = (
        Column("why", lambda reason: reason.text, wraps=True),
        Column("dW FLOPs", lambda reason: percent(reason.share), "number"),
        Column("parameters", lambda reason: str(len(reason.params)), "number"),
        Column("which", lambda reason: Some(reason.params), wraps=True),
    )
    return Table(columns, tuple(run.reasons), "What stays dense")


def together(run: RunData) -> Table:
    """A row for each kind whose scores can be compared: how far they move together; none where too little is known."""
    columns = (
        Column("kind", lambda found: found.kind),
        Column("in a layer", lambda found: r(found.within), "number"),
        Column("between layers", lambda found: r(found.layers), "number"),
        Column("in a layer, apart", lambda found: r(found.within_apart), "number"),
        Column("between, apart", lambda found: r(found.layers_apart), "number"),
    )
    return Table(columns, tuple(correlations(run.history)), "Do scores move together? r of log descents", narrow=True)


def stretches(run: RunData) -> Table:
    """A row for each change of the backward's version, the first of them."""
    columns = (
        Column("after step", lambda stretch: f"{stretch.start:,}", "number"),
        Column("to step", lambda stretch: f"{stretch.stop:,}", "number"),
        Column("version", lambda s: s.version if s.version != "both" else "dense and masked in turn"),
        Column("masked", lambda stretch: percent(stretch.masked), "number"),
    )
    return Table(columns, tuple(run.stretches[:CHANGES]), narrow=True)


def options(run: RunData) -> Table:
    """(name, value, what the default is) of each option, then what ran, and versions of libraries."""
    defaults = {name: plain(value) for name, value in asdict(Config()).items()}
    rows: list[tuple[str | Names, ...]] = []
    for name, value in run.about.get("options", {}).items():
        told = "" if name not in defaults else "default" if defaults[name] == value else f"default: {defaults[name]}"
        rows.append((Names([name]), str(value), told))
    rows += [(name, value, "") for name, value in run.identity.items()]
    rows += [(f"version of {name}", value, "") for name, value in run.about.get("versions", {}).items()]
    columns = (
        Column("", lambda row: row[0]),
        Column("", lambda row: row[1]),
        Column("", lambda row: row[2], "quiet"),
    )
    return Table(columns, tuple(rows), narrow=True)


def r(correlation: float) -> str:
    return "–" if np.isnan(correlation) else f"{correlation:+.2f}"


def spark(values: np.ndarray) -> str:
    """Shares 0 to 1 as a row of bars, at most 24 of them; any above 0 shows."""
    bins = np.array_split(values, min(_WIDTH, len(values)))
    known = [float(np.nanmean(each)) if np.isfinite(each).any() else 0.0 for each in bins]
    return "".join(_BARS[max(round(8 * min(1.0, value)), 1 if value > 0.0 else 0)] for value in known)
