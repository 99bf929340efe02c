"""Charts as SVG, drawn by matplotlib in colours that the page decides: they follow its light or dark scheme."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 430.0
"""Pixels. On a page 400 wide a chart is drawn a little smaller, on one of 1280, where two are side by side, larger."""

INK, MUTED, RULE, KIND = "#010101", "#020202", "#030303", "#040404"
COLOURS = {INK: "ink", MUTED: "muted", RULE: "rule", KIND: "kind"}
"""What matplotlib is told -> the page's own colour, which a rule of its style puts in its place."""

SMALL = 11.5
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 12.0,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.linewidth": 1.0,
    "axes.spines.left": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.labelcolor": MUTED,
    "axes.labelsize": SMALL,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "ytick.minor.size": 0.0,
    "xtick.major.pad": 6.0,
    "ytick.major.pad": 6.0,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": SMALL,
    "path.simplify": True,
}
_SVG = "{http://www.w3.org/2000/svg}"

Tips = Mapping[str, str]
"""An artist's gid -> what to say when it is pointed at."""


def draw(
    height: float, paint: Callable[[Axes], Tips | None], label: str, *, left: float = 54.0, top: float = 24.0
) -> str:
    """An SVG element, a part of a page.

    height: pixels at WIDTH, with 40 for the horizontal axis's labels; left, top: of the margins for the vertical axis's
    labels and for a legend. label: for those who cannot see it, and different from chart to chart: ids are made of it.
    """
    with rc_context(_STYLE | {"svg.hashsalt": label}):
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
        figure.patch.set_visible(False)
        axes = figure.add_axes((left / WIDTH, 40 / height, 1 - (left + 14) / WIDTH, 1 - (40 + top) / height))
        axes.patch.set_visible(False)
        tips = paint(axes) or {}
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _titled(text.getvalue(), tips, label)


def _titled(text: str, tips: Tips, label: str) -> str:
    """With what matplotlib cannot write: titles of artists. Ids that only named them would come twice on a page."""
    ET.register_namespace("", _SVG.strip("{}"))
    ET.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ET.fromstring(text)
    for group in root.iter(f"{_SVG}g"):
        name = group.attrib.pop("id", "")
        if name in tips:
            group.set("class", "tip")
            group.insert(0, title := ET.Element(f"{_SVG}title"))
            title.text = tips[name]
    for attribute in ("width", "height"):
        root.attrib.pop(attribute)
    root.set("role", "img")
    root.set("aria-label", label)
    return ET.tostring(root, encoding="unicode")
