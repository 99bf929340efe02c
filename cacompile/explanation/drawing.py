"""Drawings of boxes, clusters and lines: as DOT, Graphviz's language, and as SVG that Graphviz has laid out."""

from __future__ import annotations

import html
import importlib
import shutil
import subprocess
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from cacompile.errors import ConvAwareError
from cacompile.pages.html import render

WRAP = 50
"""Characters of a line of text; a name may be longer."""


@dataclass(frozen=True, slots=True)
class Word:
    """A piece of a line of text."""

    text: str
    strong: bool = False
    port: str = ""
    """Under which edges end at it; empty: none does."""


Line = tuple[Word, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """A box with text in it."""

    key: str
    """Its own in the drawing."""
    lines: tuple[Line, ...]
    classes: str
    """Of CSS, for `drawing.css.jinja`."""
    tip: str
    """Shown where it is pointed at."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A frame around boxes."""

    boxes: tuple[Box, ...]
    lines: tuple[Line, ...]
    classes: str
    tip: str


@dataclass(frozen=True, slots=True)
class Edge:
    """A line between two boxes, given by key, or by (key, port)."""

    source: str | tuple[str, str]
    target: str | tuple[str, str]
    classes: str = ""
    tip: str = ""
    arrow: bool = True


@dataclass(frozen=True, slots=True)
class Drawing:
    """All there is to draw, from above."""

    lines: tuple[Line, ...]
    """Its heading."""
    boxes: tuple[Box, ...] = ()
    clusters: tuple[Cluster, ...] = ()
    edges: tuple[Edge, ...] = field(default=())


class Svg(str):
    """A picture, as text: a notebook shows it, a file takes it, and printed it says what it shows."""

    words: str

    def __new__(cls, text: str, words: str = "") -> Svg:
        made = super().__new__(cls, text)
        made.words = words
        return made

    @property
    def text(self) -> str:
        """The SVG itself."""
        return self[:]

    def _repr_svg_(self) -> str:
        return self.text

    def __str__(self) -> str:
        return f"{self.words}\n(an SVG of {len(self):,} characters: a notebook shows it, path= writes it, .text has it)"


def title(text: str) -> Line:
    return (Word(text, strong=True),)


def facts(*texts: str) -> tuple[Line, ...]:
    """Lines of plain text, wrapped."""
    wrapped = (textwrap.wrap(text, WRAP, break_on_hyphens=False, break_long_words=False) for text in texts)
    return tuple((Word(line),) for lines in wrapped for line in lines)


def dot(drawing: Drawing) -> str:
    """The drawing as DOT, the same for the same drawing."""
    heading = f"label={_label(drawing.lines)}, labelloc=t, labeljust=l"
    order = "outputorder=edgesfirst, class=coupling, nodesep=0.25, ranksep=0.35"
    text = 'fontname="DejaVu Sans Mono", fontsize=9'
    lines = [
        "digraph {",
        f"  graph [{heading}, {order}, {text}];",
        f'  node [shape=box, style="rounded,filled", fillcolor=white, margin="0.18,0.05", height=0.1, {text}];',
        f"  edge [arrowsize=0.6, {text}];",
        *(f"  {_box(box)}" for box in drawing.boxes),
    ]
    for number, cluster in enumerate(drawing.clusters):
        lines.append(f"  subgraph cluster_{number} {{")
        look = f"class={_quoted(cluster.classes)}, tooltip={_quoted(cluster.tip)}, style=rounded, margin=10"
        lines.append(f"    graph [label={_label(cluster.lines)}, {look}];")
        lines += [f"    {_box(box)}" for box in cluster.boxes]
        lines.append("  }")
    home = {box.key: cluster for cluster in drawing.clusters for box in cluster.boxes}
    first = {key: cluster.boxes[0].key for key, cluster in home.items()}
    below: dict[str, None] = {}
    for edge in drawing.edges:
        (source, _), (target, _) = _end(edge.source), _end(edge.target)
        a, b = first.get(source, source), first.get(target, target)
        if home and a != b:
            below[f"  {_quoted(a)} -> {_quoted(b)} [style=invis, weight=8];"] = None
        texts = {"class": edge.classes, "tooltip": edge.tip}
        settings = [f"{name}={_quoted(value)}" for name, value in texts.items() if value]
        settings += ["dir=none"] * (not edge.arrow)
        # boxes of one cluster stand side by side
        settings += ["constraint=false"] * (source in home and home[source] is home.get(target))
        settings += ["weight=0"] * bool(home)
        ends = " -> ".join(":".join(map(_quoted, filter(None, _end(end)))) for end in (edge.source, edge.target))
        lines.append(f"  {ends} [{', '.join(settings)}];")
    # clusters one below the other, rather than each below the end of the one before
    return "\n".join([*lines, *below, "}", ""])


def svg(drawing: Drawing) -> Svg:
    """The drawing as SVG, in colours that follow the viewer's light or dark scheme; nothing outside it is needed.

    Raises ConvAwareError where neither pygraphviz (its wheels bring Graphviz along) nor Graphviz's `dot` is there.
    """
    laid_out = _laid_out(dot(drawing))
    head, end, rest = laid_out[laid_out.index("<svg") :].partition(">")
    text = f"{head}{end}<style>\n{render('drawing.css.jinja')}</style>\n{rest}"
    return Svg(text, "\n".join(_lines(drawing)))


def _lines(drawing: Drawing) -> Iterator[str]:
    """What is drawn, a line each."""
    for line in drawing.lines:
        yield "".join(word.text for word in line)
    for boxes, head in [*((cluster.boxes, cluster.lines) for cluster in drawing.clusters), (drawing.boxes, ())]:
        yield from ("".join(word.text for word in line) for line in head)
        for box in boxes:
            yield "  " + ", ".join(" ".join("".join(word.text for word in line).split()) for line in box.lines)


def _laid_out(text: str) -> str:
    try:
        library = importlib.import_module("pygraphviz")
    except ImportError:
        program = shutil.which("dot")
        if program is None:
            raise ConvAwareError(
                "a picture needs pygraphviz: pip install 'cacompile[report]'; or Graphviz's own `dot` on the PATH"
            ) from None
        command = [program, "-Tsvg"]
        return subprocess.run(command, input=text, capture_output=True, text=True, check=True, encoding="utf-8").stdout
    drawn: bytes = library.AGraph(string=text).draw(format="svg", prog="dot")
    return drawn.decode()


def _box(box: Box) -> str:
    look = f"class={_quoted(box.classes)}, tooltip={_quoted(box.tip)}"
    return f"{_quoted(box.key)} [label={_label(box.lines)}, {look}];"


def _end(end: str | tuple[str, str]) -> tuple[str, str]:
    return (end, "") if isinstance(end, str) else end


def _label(lines: Iterable[Line]) -> str:
    """A table, one row a line."""
    rows = "".join(f'<TR><TD ALIGN="LEFT">{"".join(_words(line))}</TD></TR>' for line in lines)
    return f'<<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="1">{rows}</TABLE>>' if rows else '""'


def _words(line: Line) -> Iterator[str]:
    if not any(word.port for word in line):
        yield from map(_word, line)
        return
    yield '<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="0" ALIGN="LEFT"><TR>'
    for word in line:
        port = f' PORT="{word.port}"' if word.port else ""
        yield f"<TD{port}>{_word(word)}</TD>"
    yield "</TR></TABLE>"


def _word(word: Word) -> str:
    text = html.escape(word.text, quote=False) or " "
    return f"<B>{text}</B>" if word.strong else text


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
