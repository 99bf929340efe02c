"""The coupling graph as a picture: what is drawn. `layout` says where, the templates say how."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cacompile.plan import Slice

from .fold import fold, fold_name, gather
from .groups import Group

if TYPE_CHECKING:
    from .explain import Explanation, Row

UNGROUPED = "not in any group"
_RANGE = re.compile(r"\[(\d+)(?::(\d+))?\]$")


@dataclass(frozen=True, slots=True)
class Box:
    """One parameter, or the same one of repeated layers."""

    names: tuple[str, ...]
    label: str
    """Its name, relative to the cluster that it is in."""
    shape: tuple[int, ...]
    cut: frozenset[int]
    """Dimensions along which groups are slices of it."""
    what: str
    """What happens to its gradient."""
    guarded: bool
    small: bool
    tip: str


@dataclass(frozen=True, slots=True)
class Cluster:
    """One family of groups, or the same one of repeated layers."""

    names: tuple[str, ...]
    """Families; none for the parameters that are in no group."""
    title: str
    kind: str
    facts: tuple[str, ...]
    share: float
    """Of all dW FLOPs, 0 to 1."""
    boxes: tuple[Box, ...]
    tip: str


@dataclass(frozen=True, slots=True)
class Port:
    """A dimension of a box."""

    box: Box
    dim: int


@dataclass(frozen=True, slots=True)
class Line:
    """An axis that dimensions have in common."""

    kind: str
    """Of the groups along it, or `stream`; empty where it has none."""
    label: str
    ports: tuple[Port, ...]
    tip: str


@dataclass(frozen=True, slots=True)
class Picture:
    """All there is to draw."""

    clusters: tuple[Cluster, ...]
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """All groups of one family, with the parameters that are drawn in its cluster."""

    name: str
    groups: tuple[Group, ...]
    params: tuple[str, ...]
    elsewhere: tuple[str, ...] = ()
    """Parameters that have slices in it, but more in another family."""

    @property
    def kind(self) -> str:
        return self.groups[0].kind

    @property
    def count(self) -> int:
        """Groups; one that several graphs have counts once."""
        return len({group.name for group in self.groups})

    @property
    def share(self) -> float:
        return sum(group.share for group in self.groups)

    @property
    def units(self) -> str:
        """`128 neurons`: of one group."""
        found = _RANGE.search(self.groups[0].name)
        size = int(found[2]) - int(found[1]) if found and found[2] else 1
        return f"{size} {self.kind if size != 1 else self.kind.removesuffix('s')}"


def picture_of(found: Explanation) -> Picture:
    """Families as clusters in the order of their parameters, then what is in none; repeated layers are one."""
    rows = _rows(found)
    families = families_of(found)
    inside = {name for family in families for name in family.params}

    def likeness(family: Family) -> tuple[object, ...]:
        drawn = [(_pattern(name), rows[name].shape, _what(rows[name])) for name in family.params]
        hidden = [_pattern(name) for name in family.elsewhere]
        return family.groups[0].kin, family.kind, family.count, family.units, tuple(drawn), tuple(hidden)

    clusters = [_cluster(run, rows) for run in fold(families, lambda family: family.name, likeness)]
    outside = [row for name, row in rows.items() if name not in inside]
    runs = gather(outside, lambda row: row.param, lambda row: (row.shape, _what(row)))
    if runs:
        boxes = tuple(_box([row.param for row in run], "", rows, (), run[0].families) for run in runs)
        share = sum(row.share for row in outside)
        facts = (f"{_count(len(outside), 'parameter')}, always computed{_of_flops(share)}",)
        clusters.append(Cluster((), UNGROUPED, "", facts, share, boxes, "\n".join(facts)))
    return Picture(tuple(clusters), tuple(_lines(found, clusters)))


def families_of(found: Explanation) -> list[Family]:
    """In the order of their first parameters. Each parameter is drawn in the family that has most of it."""
    groups: dict[str, list[Group]] = {name: [] for name in found.families}
    most: dict[str, Counter[str]] = {}
    for group in found.groups:
        groups[group.family].append(group)
        for piece in group.slices:
            most.setdefault(piece.param, Counter())[group.family] += piece.stop - piece.start
    home = {param: sizes.most_common(1)[0][0] for param, sizes in most.items()}
    place = {row.param: i for i, row in reversed(list(enumerate(found.rows)))}
    families = []
    for name, own in groups.items():
        params = list(dict.fromkeys(piece.param for group in own for piece in group.slices))
        here = tuple(param for param in params if home[param] == name)
        if own:
            families.append(Family(name, tuple(own), here, tuple(param for param in params if home[param] != name)))
    return sorted(families, key=lambda f: min(place.get(param, len(place)) for param in (*f.params, *f.elsewhere)))


def slice_text(piece: Slice) -> str:
    """As numpy would write it: `down.weight[:, 0:128]`."""
    return f"{piece.param}[{':, ' * piece.dim}{piece.start}:{piece.stop}]"


def _rows(found: Explanation) -> dict[str, Row]:
    """One row a parameter: of several graphs, one in which it is guarded."""
    rows: dict[str, Row] = {}
    for row in found.rows:
        if row.param not in rows or (row.operation and not rows[row.param].operation):
            rows[row.param] = row
    return rows


def _cluster(run: Sequence[Family], rows: dict[str, Row]) -> Cluster:
    first = run[0]
    share = sum(family.share for family in run)
    title = fold_name([family.name for family in run])
    facts = [f"{_count(first.count, 'group')} × {first.units}{' in each' if len(run) > 1 else ''}"]
    facts[0] += _of_flops(share) or " · always computed"
    if first.elsewhere:
        facts.append("also slices of " + ", ".join(_relative(name, first.name) for name in first.elsewhere))
    pieces = first.groups[0].slices
    boxes = []
    for names in zip(*(family.params for family in run)):
        cut = sorted({piece.dim for piece in pieces if piece.param == names[0]})
        families = rows[names[0]].families
        boxes.append(_box(names, first.name, rows, cut, [name for name in families if name != first.name]))
    tip = [title, *facts, "", f"{first.groups[0].name} is", *map(slice_text, pieces)]
    return Cluster(tuple(f.name for f in run), title, first.kind, tuple(facts), share, tuple(boxes), "\n".join(tip))


def _box(names: Sequence[str], cluster: str, rows: dict[str, Row], cut: Iterable[int], others: Iterable[str]) -> Box:
    row = rows[names[0]]
    what = _what(row)
    label = fold_name([_relative(name, cluster) for name in names]) if len(names) > 1 else _relative(row.param, cluster)
    tip = [fold_name(names), f"shape {_times(row.shape)}", what]
    if len(names) > 1:
        tip.insert(1, f"{len(names)} parameters, alike")
    if share := sum(rows[name].share for name in names):
        tip.append(f"{share:.1%} of dW FLOPs")
    if others := tuple(others):
        tip.append(f"rows of it in {', '.join(others)} too")
    small = len(row.shape) < 2 and not row.operation
    return Box(tuple(names), label, row.shape, frozenset(cut), what, bool(row.operation), small, "\n".join(tip))


def _lines(found: Explanation, clusters: Sequence[Cluster]) -> Iterable[Line]:
    """Axes that say more than the clusters do: streams, axes without groups, and those that lead to other clusters."""
    boxes = {name: (box, cluster) for cluster in clusters for box in cluster.boxes for name in box.names}
    alike: dict[tuple[str, str, tuple[Port, ...]], list[str]] = {}
    for axis in found.axes:
        owner = found.families[axis.family] if axis.family >= 0 and axis.kind != "stream" else ""
        members = [(name, dim) for name, dim in axis.members if name in boxes]
        ports = tuple(dict.fromkeys(Port(boxes[name][0], dim) for name, dim in members))
        if owner and all(owner in boxes[name][1].names for name, _ in members):
            continue
        if len(ports) < 2 and axis.kind != "stream":
            continue
        label = f"{axis.kind or 'axis'} {axis.size}"
        tip = [f"{owner or label}: an axis of {_count(len(members), 'dimension')}"]
        tip += [f"{name} [{dim}]" for name, dim in members[:12]]
        if len(members) > 12:
            tip.append(f"and {len(members) - 12} more")
        kind = axis.kind if owner or axis.kind == "stream" else ""
        alike.setdefault((kind, label, ports), []).append("\n".join(tip))
    for (kind, label, ports), tips in alike.items():
        yield Line(kind, f"{label} (× {len(tips)})" if kind == "stream" and len(tips) > 1 else label, ports, tips[0])


def _what(row: Row) -> str:
    if not row.operation:
        return f"dense: {row.reason}"
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


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _times(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape)) or "scalar"


def _of_flops(share: float) -> str:
    return f" · {share:.1%} of dW FLOPs" if share else ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"
