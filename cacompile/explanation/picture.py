"""The coupling graph as a drawing: families of groups as clusters of their parameters, shared axes as lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from cacompile.pages.html import kind_class
from cacompile.pages.numbers import count

from .drawing import Box, Cluster, Drawing, Edge, Word, facts, title
from .facts import ExplainedParam, Facts
from .families import ExplainedFamily, families_of, slice_text
from .fold import fold, fold_name, pattern

STREAMS = 5
"""Colours of streams."""


def picture(found: Facts) -> Drawing:
    """Families, then the parameters that are in none; repeated layers, alike by role, are drawn once."""
    rows = _rows(found)
    families = families_of(found)

    def likeness(family: ExplainedFamily) -> tuple[object, ...]:
        drawn = [(pattern(name), rows[name].shape, _what(rows[name])) for name in family.params]
        hidden = [pattern(name) for name in family.elsewhere]
        name = pattern(family.name)
        return family.groups[0].role_hash, name, family.kind, family.count, family.units, tuple(drawn), tuple(hidden)

    keys: dict[str, str] = {}
    """Parameter -> key of its box."""
    clusters = [_cluster(run, rows, keys) for run in fold(families, likeness)]
    outside = [row for name, row in rows.items() if name not in keys]
    runs = fold(outside, lambda row: (pattern(row.param), row.shape, _what(row)))
    boxes = [_box([row.param for row in run], "", rows, keys, (), run[0].families) for run in runs]
    edges = tuple(_edges(found, families, keys))
    names = ", ".join(dict.fromkeys(edge.tip.partition(":")[0] for edge in edges if edge.classes.startswith("stream")))
    heading = ["Dashed: always computed. Bold: groups are slices along it."]
    heading += ["Lines: axes in common" + (f", among them {names}." if names else ".")] * bool(edges)
    if outside:
        share = _of_flops(sum(row.share for row in outside))
        heading.append(f"Not in any group: {count(len(outside), 'parameter')}, always computed{share}.")
    # Graphviz draws no frame around nothing: a family of which all is drawn elsewhere is a box
    boxes += [Box(f"groups {c.tip}", c.lines, c.classes, c.tip) for c in clusters if not c.boxes]
    clusters = [cluster for cluster in clusters if cluster.boxes]
    lines = (title("Weights that are kept or skipped together"), *facts(*heading))
    return Drawing(lines, tuple(boxes), tuple(clusters), edges)


def _rows(found: Facts) -> dict[str, ExplainedParam]:
    """One row a parameter: of several graphs, one in which it is masked."""
    rows: dict[str, ExplainedParam] = {}
    for row in found.rows:
        if row.param not in rows or (row.operation and not rows[row.param].operation):
            rows[row.param] = row
    return rows


def _cluster(run: Sequence[ExplainedFamily], rows: dict[str, ExplainedParam], keys: dict[str, str]) -> Cluster:
    first = run[0]
    name = fold_name([family.name for family in run])
    times = f" × {len(run)}" if len(run) > 1 else ""
    text = f"{count(first.count, 'group')} × {first.units}{' in each' if times else ''}"
    more = [text + (_of_flops(sum(family.share for family in run)) or " · always computed")]
    if first.elsewhere:
        more.append("also slices of " + ", ".join(_relative(name, first.name) for name in first.elsewhere))
    pieces = first.groups[0].slices
    boxes = []
    for names in zip(*(family.params for family in run)):
        along = {piece.dim for piece in pieces if piece.param == names[0]}
        others = [family for family in rows[names[0]].families if family != first.name]
        boxes.append(_box(names, first.name, rows, keys, along, others))
    tip = "\n".join([name, *more, "", f"{first.groups[0].name} is", *map(slice_text, pieces)])
    return Cluster(tuple(boxes), (title(name + times), *facts(*more)), kind_class(first.kind), tip)


def _box(
    names: Sequence[str],
    beside: str,
    rows: dict[str, ExplainedParam],
    keys: dict[str, str],
    along: Iterable[int],
    others: Sequence[str],
) -> Box:
    """The same parameter of repeated layers; along: dimensions along which groups are slices of it."""
    row = rows[names[0]]
    keys.update(dict.fromkeys(names, row.param))
    tip = [fold_name(names), f"shape {' × '.join(map(str, row.shape)) or 'scalar'}", _what(row)]
    if len(names) > 1:
        tip.insert(1, f"{len(names)} parameters, alike")
    if share := sum(rows[name].share for name in names):
        tip.append(f"{share:.1%} of dW FLOPs")
    if others:
        tip.append(f"rows of it in {', '.join(others)} too")
    label = fold_name([_relative(name, beside) for name in names])
    shape: list[Word] = []
    for dim, size in enumerate(row.shape):
        shape += [Word(" × ")] * bool(dim) + [Word(str(size), strong=dim in along, port=f"d{dim}")]
    small = len(row.shape) < 2 and not row.operation
    lines = (title(label), *(() if small else facts(_what(row))), tuple(shape) or (Word("scalar"),))
    return Box(row.param, lines, "" if row.operation else "dense", "\n".join(tip))


def _edges(found: Facts, families: Sequence[ExplainedFamily], keys: dict[str, str]) -> Iterator[Edge]:
    """Axes that say more than the clusters do: streams, axes without groups, and those that lead to other clusters.

    An axis goes from box to box in the graph's order; one of repeated layers is drawn once.
    """
    home = {param: family.name for family in families for param in family.params}
    alike: dict[tuple[str, str, tuple[tuple[str, str], ...]], str] = {}
    for axis in found.axes:
        owner = found.families[axis.family] if axis.family >= 0 and axis.kind != "stream" else ""
        members = [(name, dim) for name, dim in axis.members if name in keys]
        ports = tuple(dict.fromkeys((keys[name], f"d{dim}") for name, dim in members))
        if len(ports) < 2 or (owner and all(home.get(name) == owner for name, _ in members)):
            continue
        label = owner or f"{axis.kind or 'axis'} {axis.size}"
        tip = [f"{label}: an axis of {count(len(members), 'dimension')}"]
        tip += [f"{name} [{dim}]" for name, dim in members[:12]]
        tip += [f"and {len(members) - 12} more"] * (len(members) > 12)
        kind = axis.kind if owner or axis.kind == "stream" else ""
        alike.setdefault((kind, label, ports), "\n".join(tip))
    streams = 0
    for (kind, _, ports), tip_of_first in alike.items():
        look = kind_class(kind)
        if kind == "stream":
            look, streams = f"stream stream-{streams % STREAMS}", streams + 1
        for source, target in pairwise(ports):
            yield Edge(source, target, look, tip_of_first, arrow=False)


def _what(row: ExplainedParam) -> str:
    if not row.operation:
        return row.fate
    operation = row.operation
    if operation.startswith("with "):
        operation = f"with {_relative(operation.removeprefix('with '), row.param)}"
    return f"{row.blocks} × {row.block} {row.along} · {operation}"


def _relative(name: str, beside: str) -> str:
    """Without the modules that both are in."""
    steps, others = name.split("."), beside.split(".")
    shared = 0
    while shared < min(len(steps) - 1, len(others)) and steps[shared] == others[shared]:
        shared += 1
    return ".".join(steps[shared:])


def _of_flops(share: float) -> str:
    return f" · {share:.1%} of dW FLOPs" if share else ""
