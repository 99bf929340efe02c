"""A run as one page of HTML that needs nothing else: no network, no script."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np

from cacompile.config import Config

from .draw import render
from .run_data import Run
from .run_text import amount, count, duration, percent

Picture = tuple[str, str, str, str]
"""Title, what it says, SVG, kind of groups whose colour it has (without one: any)."""

_ANY = "neurons"


def page(run: Run) -> str:
    """Readable at 800 pixels and more, in the browser's light or dark scheme."""
    from .run import library

    library("matplotlib", "report")
    drawn = bool(run.readings)
    return render(
        "run.html.jinja",
        run=run,
        figures=_figures(run),
        whole=_whole(run) if drawn else [],
        heats=_heats(run) if drawn else [],
        curves=_curves(run) if drawn else [],
        all_flops=sum(family.flops for family in run.families) or 1.0,
        defaults=asdict(Config()),
    )


def _figures(run: Run) -> list[tuple[str, str]]:
    known = run.step_seconds[np.isfinite(run.step_seconds)]
    figures = [
        ("dW FLOPs saved", f"{amount(run.saved)} of {amount(run.total)}"),
        ("of whole steps, about", percent(run.whole_share)),
        ("backwards guarded", f"{run.guarded:,} of {run.backwards:,}"),
        ("groups", f"{len(run.history.groups):,} in {count(len(run.families), 'family', 'families')}"),
    ]
    if run.readings:
        figures.append(("skipped when last read", count(int(run.history.skipped[-1]), "group")))
    if len(known):
        figures.append(("time of a step, median", duration(float(np.median(known)))))
        figures.append(("wall clock", duration(run.seconds)))
    return figures


def _whole(run: Run) -> list[Picture]:
    from . import run_figures as draw

    pictures = [
        ("Share of dW that was skipped", "Of the FLOPs of all weight gradients; shaded: warm-up.", draw.share(run)),
        ("dW FLOPs so far", "What a dense run would have spent, and what was computed.", draw.flops(run)),
        ("Which backward ran", "Dense is Inductor's own; guarded leaves out what the mask says.", draw.versions(run)),
    ]
    if np.isfinite(run.step_seconds).any():
        note = "Wall clock, with all that the loop does; a peak where guarded ones begin is compiling."
        pictures.append(("Time of a step", note, draw.times(run)))
    return [(*picture, _ANY) for picture in pictures]


def _heats(run: Run) -> list[Picture]:
    from .run_layers import heat

    return [(kind.capitalize(), _sizes(run, kind), heat(run, kind), kind) for kind in run.kinds]


def _curves(run: Run) -> list[Picture]:
    from .run_layers import curves

    notes = {
        "descent": "Loss decrease that is expected of one step: falls as they converge.",
        "speed": "Movement in one step, as a share of their own size.",
    }
    return [
        (f"{kind.capitalize()}: {quantity}", notes[quantity], curves(run, kind, quantity), kind)
        for kind in run.kinds
        for quantity in notes
    ]


def _sizes(run: Run, kind: str) -> str:
    families = [family for family in run.families if family.kind == kind]
    flops = sum(family.flops for family in run.families) or 1.0
    groups = sum(family.skipped.shape[1] for family in families)
    layers = count(len(families), "layer")
    return f"{count(groups, 'group')} in {layers}, {percent(sum(f.flops for f in families) / flops)} of dW FLOPs."
