"""A run as tables for the terminal."""

from __future__ import annotations

from typing import TextIO

from cacompile.pages.libraries import library
from cacompile.pages.numbers import amount, duration
from cacompile.sessions.about import frozen_lines

from . import tables
from .data import RunData


def show(run: RunData, file: TextIO) -> None:
    """Print the figures, a row for each family, and what stays dense; as wide as the terminal, or 120 in a file."""
    console_of = library("rich.console", "report").Console
    console = console_of(file=file, highlight=False, width=None if file.isatty() else 120, soft_wrap=False)
    console.print(run.headline, style="bold", markup=False)
    parts = f" ({run.parts})" if run.parts else ""
    lines = [
        "; ".join(run.identity.values()),
        f"{amount(run.saved)} of {amount(run.step_flops)} FLOPs{parts}; {run.masked:,} of {run.backwards:,} backward "
        f"passes masked; {duration(run.seconds)} of wall clock",
        f"loss {run.losses[1][-1]:.4g} at step {run.losses[0][-1]:,}" if len(run.losses[0]) else "",
        run.small_part,
        *frozen_lines(run.frozen),
        run.why_nothing,
    ]
    for line in filter(None, lines):
        console.print(line, markup=False)
    if run.measurements:
        console.print(tables.families(run))
        if (together := tables.together(run)).rows:
            console.print(together)
    if run.reasons:
        console.print(tables.reasons(run))
