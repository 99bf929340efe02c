"""A run as tables for the terminal."""

from __future__ import annotations

from typing import TextIO

import numpy as np

from cacompile.pages.libraries import library
from cacompile.pages.numbers import amount, duration, percent, scientific
from cacompile.sessions.about import frozen_lines

from .data import RunData

_BARS = " ▁▂▃▄▅▆▇█"
_WIDTH = 24


def show(run: RunData, file: TextIO) -> None:
    """Print the figures, a row for each family, and what stays dense; as wide as the terminal, or 120 in a file."""
    console_of, table_of = library("rich.console", "report").Console, library("rich.table", "report").Table
    console = console_of(file=file, highlight=False, width=None if file.isatty() else 120, soft_wrap=False)
    console.print(run.headline, style="bold", markup=False)
    console.print(
        f"{amount(run.saved)} of {amount(run.total)} dW FLOPs, {percent(run.whole_share)} of forward and backward; "
        f"{run.masked:,} of {run.backwards:,} backward passes masked; {duration(run.seconds)} of wall clock",
        markup=False,
    )
    for line in frozen_lines(run.frozen):
        console.print(line, markup=False)
    if run.why_nothing:
        console.print(run.why_nothing, markup=False)
    if run.measurements:
        first, last = run.history.step[0], run.history.step[-1]
        table = table_of(title=f"Families, steps {first} to {last}", title_justify="left")
        table.add_column("family", overflow="fold")
        for head in ("groups", "dW FLOPs"):
            table.add_column(head, justify="right")
        table.add_column("skipped, over time", no_wrap=True)
        for head in ("now", "descent", "update ratio"):
            table.add_column(head, justify="right")
        flops = sum(family.flops for family in run.families) or 1.0
        for family in run.families:
            table.add_row(
                _plain(family.name),
                str(family.skipped.shape[1]),
                percent(family.flops / flops),
                spark(family.share),
                percent(family.share[-1]),
                scientific(family.descent[-1]),
                scientific(family.update_ratio[-1]),
            )
        console.print(table)
    if run.reasons:
        table = table_of(title="What stays dense", title_justify="left")
        table.add_column("why", overflow="fold", ratio=3)
        table.add_column("dW FLOPs", justify="right")
        table.add_column("parameters", overflow="fold", ratio=2)
        for reason in run.reasons:
            names = ", ".join(reason.params[:3]) + (f" and {len(reason.params) - 3} more" if reason.params[3:] else "")
            table.add_row(_plain(reason.text), percent(reason.share), _plain(names))
        console.print(table)


def spark(values: np.ndarray) -> str:
    """Shares 0 to 1 as a row of bars, at most 24 of them."""
    bins = np.array_split(values, min(_WIDTH, len(values)))
    known = [float(np.nanmean(each)) if np.isfinite(each).any() else 0.0 for each in bins]
    return "".join(_BARS[round(min(1.0, max(0.0, value)) * 8)] if value <= 0.0 else _BARS[max(1, round(value * 8))]
                   for value in known)  # fmt: skip


def _plain(text: str) -> str:
    return text.replace("[", "\\[")
