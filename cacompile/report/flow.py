"""Where everything of a neighbourhood goes: layers from above, each as near as it can be to what it is joined with.

┌ saved ┐   ┌ incoming ┐
└───┬───┘   └────┬─────┘
    │      ┌ permute ┐   ┌ groups ┐
    └────┐ └────┬────┘   └───┬────┘
      ┌ masked_mm ──────────────┐
      └─────────┬───────────────┘
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import networkx as nx

from .boxes import PAD, Text, width_of
from .neighbourhood import Sketch, Spot

MARGIN = 20.0
GAP = 26.0  # between boxes of a layer
STEP = 40.0  # between layers, for the arrows
WRAP = 44
_LINES = {"what": 14.0, "name": 17.0, "fact": 15.0}
"""Style of a text -> height of its line."""

Node = str | tuple[str, str, int]
"""A spot's key, or where an arrow passes a layer."""


@dataclass(frozen=True, slots=True)
class PlacedSpot:
    spot: Spot
    x: float
    y: float
    width: float
    height: float
    texts: tuple[Text, ...]


@dataclass(frozen=True, slots=True)
class Flow:
    width: float
    height: float
    texts: tuple[Text, ...]
    """Above all: the title, and what there is to say."""
    spots: tuple[PlacedSpot, ...]
    arrows: tuple[str, ...]
    """Paths."""


def place(sketch: Sketch) -> Flow:
    texts = [Text(MARGIN, MARGIN + 12, sketch.title, "head")]
    for line in (line for fact in sketch.facts for line in textwrap.wrap(fact, 90)):
        texts.append(Text(MARGIN, texts[-1].y + 18, line, "fact"))
    spots = {spot.key: spot for spot in sketch.spots}
    graph, layers = _layered(sketch)
    widths = {node: _width(spots[node]) if isinstance(node, str) else 2.0 for node in graph}
    _order(graph, layers)
    middles = _middles(graph, layers, widths)
    shift = MARGIN - min((middles[node] - widths[node] / 2 for node in graph), default=MARGIN)
    y = texts[-1].y + 22
    tops: dict[Node, float] = {}
    bottoms: dict[Node, float] = {}
    placed = []
    for layer in layers:
        height = max((_height(spots[node]) for node in layer if isinstance(node, str)), default=0.0)
        for node in layer:
            middles[node] += shift
            own = _height(spots[node]) if isinstance(node, str) else height
            tops[node], bottoms[node] = y + (height - own) / 2, y + (height + own) / 2
            if isinstance(node, str):
                placed.append(_placed(spots[node], middles[node] - widths[node] / 2, tops[node], widths[node]))
        y += height + STEP
    paths = [_path(way, graph, middles, widths, tops, bottoms) for way in _ways(sketch, graph)]
    right = max((spot.x + spot.width for spot in placed), default=0.0)
    right = max(right, *(text.x + text.width for text in texts), *(middles[n] for n in graph)) if placed else right
    return Flow(right + MARGIN, y - STEP + MARGIN, tuple(texts), tuple(placed), tuple(paths))


def _layered(sketch: Sketch) -> tuple[nx.DiGraph, list[list[Node]]]:
    """The graph, arrows over several layers being cut where they pass one; layers from above."""
    plain = nx.DiGraph()
    plain.add_nodes_from(spot.key for spot in sketch.spots)
    plain.add_edges_from(sketch.arrows)
    depth: dict[str, int] = {}  # below a node, so that inputs stand right above what they are for
    for node in reversed(list(nx.topological_sort(plain))):
        depth[node] = max((depth[user] + 1 for user in plain.successors(node)), default=0)
    last = max(depth.values(), default=0)
    graph = nx.DiGraph()
    graph.add_nodes_from(plain)
    layers: list[list[Node]] = [[] for _ in range(last + 1)]
    for node in plain:
        layers[last - depth[node]].append(node)
    for source, user in plain.edges:
        way: list[Node] = [source, *((source, user, d) for d in range(depth[source] - 1, depth[user], -1)), user]
        for passed in way[1:-1]:
            layers[last - int(passed[2])].append(passed)
        nx.add_path(graph, way)
    return graph, layers


def _order(graph: nx.DiGraph, layers: list[list[Node]]) -> None:
    """Sweeps down and up, each layer sorted by where its neighbours in the layer before are: few arrows cross."""
    for sweep in range(8):
        down = sweep % 2 == 0
        steps = list(pairwise(layers if down else layers[::-1]))
        for fixed, free in steps:
            place = {node: i for i, node in enumerate(fixed)}
            near = graph.pred if down else graph.succ
            middle = {n: fmean([place[m] for m in near[n]]) if near[n] else float(i) for i, n in enumerate(free)}
            free.sort(key=middle.__getitem__)


def _middles(graph: nx.DiGraph, layers: Sequence[Sequence[Node]], widths: dict[Node, float]) -> dict[Node, float]:
    """Each node as near as possible to the mean of its neighbours, without overlap."""
    middles: dict[Node, float] = {}
    for layer in layers:
        x = 0.0
        for node in layer:
            middles[node] = x + widths[node] / 2
            x += widths[node] + GAP
    for sweep in range(101):  # small graphs, so until nothing moves; downwards last
        for layer in layers if sweep % 2 == 0 else layers[::-1]:
            wanted = []
            for node in layer:
                near = [*graph.pred[node], *graph.succ[node]]
                wanted.append(fmean([middles[other] for other in near]) if near else middles[node])
            for node, x in zip(layer, _apart(wanted, [widths[node] for node in layer])):
                middles[node] = x
    return middles


def _apart(wanted: Sequence[float], widths: Sequence[float]) -> list[float]:
    """As near to what is wanted as they can be, in the sum of squares, without overlap: those that meet move as one."""
    offsets = [0.0]
    for a, b in pairwise(widths):
        offsets.append(offsets[-1] + (a + b) / 2 + GAP)
    runs: list[tuple[float, int]] = []  # (mean of where its first would be, members)
    for x, offset in zip(wanted, offsets):
        mean, count = x - offset, 1
        while runs and runs[-1][0] > mean:
            before, members = runs.pop()
            mean = (before * members + mean * count) / (members + count)
            count += members
        runs.append((mean, count))
    starts = [mean for mean, count in runs for _ in range(count)]
    return [start + offset for start, offset in zip(starts, offsets)]


def _ways(sketch: Sketch, graph: nx.DiGraph) -> list[list[Node]]:
    """Each arrow with all that it passes."""
    ways = []
    for source, user in sketch.arrows:
        passed = sorted((n for n in graph if n[:2] == (source, user)), key=lambda n: -n[2])
        ways.append([source, *passed, user])
    return ways


def _path(
    way: list[Node],
    graph: nx.DiGraph,
    middles: dict[Node, float],
    widths: dict[Node, float],
    tops: dict[Node, float],
    bottoms: dict[Node, float],
) -> str:
    """From below the first to above the last; those that come from or go to several places have ends beside one
    another."""

    def beside(node: Node, other: Node, others: list[Node]) -> float:
        ordered = sorted(others, key=middles.__getitem__)
        step = min(34.0, 0.6 * widths[node] / max(1, len(ordered)))
        return middles[node] + step * (ordered.index(other) - (len(ordered) - 1) / 2)

    x, y = beside(way[0], way[1], list(graph.succ[way[0]])), bottoms[way[0]]
    path = f"M{x:.1f} {y:.1f}"
    for before, node in pairwise(way):
        last = node == way[-1]
        to = beside(node, before, list(graph.pred[node])) if last else middles[node]
        end = tops[node] - (5 if last else 0)  # the point of the arrow
        half = (y + end) / 2
        path += f"C{x:.1f} {half:.1f} {to:.1f} {half:.1f} {to:.1f} {end:.1f}"
        x, y = to, end
        if not last and bottoms[node] > y:
            y = bottoms[node]
            path += f"V{y:.1f}"
    return path


def _texts(spot: Spot) -> list[tuple[str, str]]:
    """(text, style), from above."""
    facts = [line for fact in spot.facts for line in textwrap.wrap(fact, WRAP, break_on_hyphens=False)]
    return [(spot.what, "what"), *((name, "name") for name in _broken(spot.name)), *((fact, "fact") for fact in facts)]


def _broken(name: str) -> list[str]:
    """A long name, broken after dots, or before its shape."""
    lines = [""]
    for step in name.replace(".", ".\0").replace(" [", " \0[").split("\0"):
        if lines[-1] and len(lines[-1]) + len(step) > WRAP:
            lines.append("")
        lines[-1] += step
    return [line.rstrip() for line in lines]


def _width(spot: Spot) -> float:
    return max(width_of(text, style) for text, style in _texts(spot)) + 2 * PAD


def _height(spot: Spot) -> float:
    return sum(_LINES[style] for _, style in _texts(spot)) + 14


def _placed(spot: Spot, x: float, y: float, width: float) -> PlacedSpot:
    texts = []
    baseline = y + 4
    for text, style in _texts(spot):
        baseline += _LINES[style]
        texts.append(Text(x + PAD, baseline, text, style))
    return PlacedSpot(spot, x, y, width, _height(spot), tuple(texts))
