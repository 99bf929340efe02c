"""A neighbourhood as DOT, Graphviz's language: text, for whoever has tools that read it."""

from __future__ import annotations

from .neighbourhood import Sketch, Spot

_STYLE = {
    "masked": "filled,bold",
    "product": "filled,bold",
    "groups": "filled,rounded",
    "gradient": "bold",
    "view": "dashed",
}


def dot(sketch: Sketch) -> str:
    """A digraph, its inputs above."""
    lines = ["digraph {", f"  label={_quoted(sketch.title, *sketch.facts)};", "  labelloc=t;"]
    lines.append('  node [shape=box, fontname="monospace", fontsize=10, fillcolor="#e4ecfd"];')
    lines += [f"  {_quoted(spot.key)} [label={_label(spot)}, style={_quoted(_style(spot))}];" for spot in sketch.spots]
    lines += [f"  {_quoted(source)} -> {_quoted(user)};" for source, user in sketch.arrows]
    return "\n".join([*lines, "}", ""])


def _label(spot: Spot) -> str:
    return _quoted(spot.what, spot.name, *spot.facts)


def _style(spot: Spot) -> str:
    return _STYLE.get(spot.role, "solid")


def _quoted(*texts: str) -> str:
    lines = (text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") for text in texts)
    return '"' + "\\n".join(lines) + '"'
