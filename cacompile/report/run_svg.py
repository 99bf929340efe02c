"""Charts as SVG, drawn by matplotlib in colours that the page decides: they follow its light or dark scheme."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 600.0
"""Pixels, where two stand side by side on a page of 1280."""

INK, MUTED, RULE, KIND = "#010101", "#020202", "#030303", "#040404"
_COLOURS = {INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)", KIND: "var(--kind)"}
"""What matplotlib is told -> what the page is told."""

SMALL = 10.5
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cacompile",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11.0,
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
_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"

Tips = Mapping[str, str]
"""An artist's gid -> what to say when it is pointed at."""


def draw(
    height: float, paint: Callable[[Axes], Tips | None], label: str, *, left: float = 58.0, top: float = 26.0
) -> str:
    """An SVG element.

    height: pixels, with 40 for the horizontal axis's labels; left, top: of the margins for the vertical axis's labels
    and for a legend. label: for those who cannot see it.
    """
    with rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
        figure.patch.set_visible(False)
        axes = figure.add_axes((left / WIDTH, 40 / height, 1 - (left + 14) / WIDTH, 1 - (40 + top) / height))
        axes.patch.set_visible(False)
        tips = paint(axes) or {}
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(text.getvalue(), tips, label)


def _inline(text: str, tips: Tips, label: str) -> str:
    """As a part of a page: without a header, with ids of its own, in the page's colours and font."""
    for told, page in _COLOURS.items():
        text = text.replace(told, page)
    ET.register_namespace("", _SVG.strip("{}"))
    ET.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ET.fromstring(text)
    for child in root.findall(f"{_SVG}metadata"):
        root.remove(child)
    prefix = f"f{zlib.crc32((label + text).encode()):08x}-"
    for node in root.iter():
        name, target, clip = node.get("id"), node.get(_LINK, ""), node.get("clip-path")
        if name:
            node.set("id", prefix + name)
        if target.startswith("#"):
            node.set(_LINK, f"#{prefix}{target[1:]}")
        if clip:
            node.set("clip-path", clip.replace("url(#", f"url(#{prefix}"))
        if node.tag == f"{_SVG}text" and (style := node.get("style")):
            node.set("style", style.replace("DejaVu Sans", "system-ui"))
        if name and name.startswith("cells"):
            node.set("shape-rendering", "crispEdges")  # neighbours must not show the seam between them
        if name and name in tips:
            title = ET.Element(f"{_SVG}title")
            title.text = tips[name]
            node.insert(0, title)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", label)
    return ET.tostring(root, encoding="unicode")
