"""How large texts and boxes are. Widths are estimates: the font is monospace, which one is for the viewer to choose."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from .picture import Box

PAD = 12.0
ADVANCE = 0.61  # width of a character, as a share of the font's height, in the widest of the usual fonts
FONTS = {"head": 15.0, "title": 13.0, "fact": 11.0, "name": 12.0, "what": 10.5, "shape": 12.0, "wire": 10.5}
"""Style of a text -> its size."""


@dataclass(frozen=True, slots=True)
class Text:
    x: float
    y: float
    """Of the baseline."""
    text: str
    style: str
    """Among FONTS."""

    @property
    def width(self) -> float:
        return width_of(self.text, self.style)


@dataclass(frozen=True, slots=True)
class PlacedBox:
    box: Box
    x: float
    y: float
    width: float
    height: float
    texts: tuple[Text, ...]
    shape: Text
    """Its lowest text; lines end below its numbers."""

    def pieces(self) -> Iterator[tuple[str, bool]]:
        """Of the shape: (text, whether groups are slices along it)."""
        for dim, size in enumerate(self.box.shape):
            yield " × " if dim else "", False
            yield str(size), dim in self.box.cut
        if not self.box.shape:
            yield self.shape.text, False

    def port(self, dim: int) -> float:
        """The middle of a dimension's number."""
        before = "".join(f"{size} × " for size in self.box.shape[:dim])
        return self.shape.x + width_of(before, "shape") + width_of(str(self.box.shape[dim]), "shape") / 2


def width_of(text: str, style: str) -> float:
    return len(text) * FONTS[style] * ADVANCE


def width_of_box(box: Box) -> float:
    return max(width_of(text, style) for text, style, _ in _texts(box)) + 2 * (PAD - 2)


def height_of_box(box: Box) -> float:
    return sum(height for *_, height in _texts(box)) + 10


def place_box(box: Box, x: float, y: float) -> PlacedBox:
    texts: list[Text] = []
    baseline = y + 3
    for text, style, height in _texts(box):
        baseline += height
        texts.append(Text(x + PAD - 2, baseline, text, style))
    return PlacedBox(box, x, y, width_of_box(box), height_of_box(box), tuple(texts[:-1]), texts[-1])


def _texts(box: Box) -> list[tuple[str, str, float]]:
    """(text, style, height), from above; the last is the shape."""
    what = [] if box.small else textwrap.wrap(box.what, 34, break_long_words=False, break_on_hyphens=False)
    lines = [(text, "name", 15.0) for text in _break(box.label)] + [(text, "what", 14.0) for text in what]
    return [*lines, (" × ".join(map(str, box.shape)) or "scalar", "shape", 16.0)]


def _break(name: str) -> list[str]:
    """A long name, broken after dots."""
    lines = [""]
    for step in name.split("."):
        if lines[-1] and len(lines[-1]) + len(step) > 26:
            lines.append("")
        lines[-1] += f"{step}."
    return [*lines[:-1], lines[-1].removesuffix(".")]
