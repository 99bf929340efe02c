"""A run as one page of HTML that needs nothing else: no network, no script."""

from __future__ import annotations

import numpy as np

from cacompile.pages.html import render
from cacompile.pages.libraries import library
from cacompile.pages.numbers import amount, count, duration, percent
from cacompile.sessions.about import frozen_lines

from . import tables
from .data import RunData

Picture = tuple[str, str, str, str]
"""Title, what it says, SVG, kind of groups whose colour it has (without one: any)."""

_ANY = "neurons"


def page(run: RunData) -> str:
    """Readable from 400 pixels on, in the browser's light or dark scheme."""
    library("matplotlib", "report")
    from .svg import COLOURS as colours

    drawn = bool(run.measurements)
    return render(
        "run.html.jinja",
        run=run,
        figures=_figures(run),
        whole=_whole(run) if drawn else [],
        heats=_heats(run) if drawn else [],
        curves=_curves(run) if drawn else [],
        tables=tables,
        colours=colours,
    )


def _figures(run: RunData) -> list[tuple[str, str]]:
    known = run.step_seconds[np.isfinite(run.step_seconds)]
    figures = [
        ("FLOPs saved", f"{amount(run.saved)} of {amount(run.step_flops)}"),
        ("of dW", f"{percent(run.share)} of {amount(run.total)}"),
        *([("what a step is", run.parts)] if run.parts else []),
        ("backwards masked", f"{run.masked:,} of {run.backwards:,}"),
        ("groups", f"{len(run.history.groups):,} in {count(len(run.families), 'family', 'families')}"),
    ]
    figures += [("frozen", line.removeprefix("frozen ")) for line in frozen_lines(run.frozen)]
    if len(run.losses[0]):
        figures.append(("loss, last", f"{run.losses[1][-1]:.4g}"))
    if run.measurements:
        figures.append(("skipped when last read", count(int(run.history.skipped[-1]), "group")))
    if len(known):
        figures.append(("time of a step, median", duration(float(np.median(known)))))
        figures.append(("wall clock", duration(run.seconds)))
    return figures


def _whole(run: RunData) -> list[Picture]:
    from cacompile.report import charts as draw

    title, note = "Share of the steps that was skipped", "Of the FLOPs of forward and backward; shaded: warm-up."
    if not draw.knows_steps(run):
        title, note = "Share of dW that was skipped", "Of the FLOPs of all weight gradients; shaded: warm-up."
    pictures = [
        (title, note, draw.share(run)),
        ("dW FLOPs so far", "What a dense run would have spent, and what was computed.", draw.flops(run)),
        ("Which backward ran", "Dense is Inductor's own; masked leaves out what the mask says.", draw.versions(run)),
    ]
    if np.isfinite(run.step_seconds).any():
        note = "Wall clock, with all that the loop does; a peak where masked ones begin is compiling."
        pictures.append(("Time of a step", note, draw.times(run)))
    if len(run.losses[0]):
        pictures.append(("Loss", "As whoever trains has told it.", draw.loss(run)))
    return [(*picture, _ANY) for picture in pictures]


def _heats(run: RunData) -> list[Picture]:
    from .layers import heat

    return [(kind.capitalize(), _sizes(run, kind), heat(run, kind), kind) for kind in run.kinds]


def _curves(run: RunData) -> list[Picture]:
    from .layers import curves

    notes = {
        "descent": "Loss decrease that is expected of one step: falls as they converge.",
        "update_ratio": "Movement in one step, as a share of their own size.",
    }
    return [
        (f"{kind.capitalize()}: {quantity.replace('_', ' ')}", notes[quantity], curves(run, kind, quantity), kind)
        for kind in run.kinds
        for quantity in notes
    ]


def _sizes(run: RunData, kind: str) -> str:
    families = [family for family in run.families if family.kind == kind]
    flops = sum(family.flops for family in run.families) or 1.0
    groups = sum(family.skipped.shape[1] for family in families)
    layers = count(len(families), "layer")
    return f"{count(groups, 'group')} in {layers}, {percent(sum(f.flops for f in families) / flops)} of dW FLOPs."
