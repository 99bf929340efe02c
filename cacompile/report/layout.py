"""Where everything of the picture goes: clusters on shelves, and to their left the lines that run past several shelves.

│ │   ┌ cluster ────────────┐ ┌ cluster ──────┐
│ │   │ [box] [box]         │ │ [box] [box]   │    a band of boxes
│ ●───┼──┴──────────────────┼─┼────────┘      │    its gutter: a level for each line
●─┼───┼────────┴────────────┼─┼──┘            │
│ │   └─────────────────────┘ └───────────────┘
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .boxes import PAD, PlacedBox, Text, height_of_box, place_box, width_of, width_of_box
from .picture import Box, Cluster, Line, Picture

WIDTH = 940.0  # of a shelf, unless one cluster is wider
MARGIN = 20.0
GAP = 14.0  # between boxes and between clusters
LANE = 20.0
LEVEL = 12.0
STUB = 10.0  # from the boxes to the first level
COLOURS = 5  # of streams


@dataclass(frozen=True, slots=True)
class PlacedCluster:
    cluster: Cluster
    x: float
    y: float
    width: float
    height: float
    texts: tuple[Text, ...]
    boxes: tuple[PlacedBox, ...]


@dataclass(frozen=True, slots=True)
class Wire:
    line: Line
    colour: int
    """Of a stream, 0 to COLOURS - 1; -1 for the colour of its kind."""
    path: str
    dots: tuple[tuple[float, float], ...]
    label: Text
    upright: bool
    """Whether the label is turned, to run up from where it begins."""


@dataclass(frozen=True, slots=True)
class Drawing:
    width: float
    height: float
    clusters: tuple[PlacedCluster, ...]
    wires: tuple[Wire, ...]


@dataclass(slots=True)
class _Band:
    """Boxes side by side on one shelf, and the lines that run below them."""

    boxes: list[Box] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    bottom: float = 0.0
    """Of the boxes."""

    @property
    def height(self) -> float:
        return max((height_of_box(box) for box in self.boxes), default=0.0)

    @property
    def gutter(self) -> float:
        return PAD + (STUB + LEVEL * (len(self.lines) - 1) if self.lines else 0.0)

    def level(self, line: Line) -> float:
        return self.bottom + STUB + LEVEL * self.lines.index(line)


@dataclass(slots=True)
class _Shelf:
    """Clusters side by side. Several have one band in common; one that needs more bands has the shelf for itself."""

    clusters: list[tuple[Cluster, list[list[Box]], float]]
    """With its boxes, row by row, and its width."""
    bands: list[_Band] = field(default_factory=list)
    top: float = 0.0
    bottom: float = 0.0

    @property
    def width(self) -> float:
        return sum(width for *_, width in self.clusters) + GAP * (len(self.clusters) - 1)


def place(picture: Picture, top: float = 0.0) -> Drawing:
    """top: what is to be left free above."""
    shelves = _shelves(picture)
    bands = [band for shelf in shelves for band in shelf.bands]
    where: dict[Line, list[_Band]] = {}
    for line in picture.lines:
        ends = {id(port.box) for port in line.ports}
        where[line] = [band for band in bands if any(id(box) in ends for box in band.boxes)]
        for band in where[line]:
            band.lines.append(line)
    _stack(shelves, top + MARGIN)
    lanes = [line for line in picture.lines if len(where[line]) > 1]
    if (short := top + MARGIN - min((_reach(line, where[line])[0] for line in lanes), default=top + MARGIN)) > 0:
        _stack(shelves, top + MARGIN + short)  # for the label of the first line
    columns = _columns(lanes, where)
    names = max((width_of(line.label, "wire") + PAD for line in picture.lines if line not in columns), default=0.0)
    left = MARGIN + LANE * (max(columns.values(), default=-1) + 1) + names
    clusters = [placed for shelf in shelves for placed in _clusters(shelf, left)]
    boxes = {id(placed.box): placed for cluster in clusters for placed in cluster.boxes}
    streams = [line for line in picture.lines if line.kind == "stream"]
    wires = []
    for line in picture.lines:
        colour = streams.index(line) % COLOURS if line.kind == "stream" else -1
        lane = MARGIN + LANE * (columns[line] + 0.5) if line in columns else None
        wires.append(_wire(line, colour, where[line], lane, left - PAD / 2, boxes))
    width = left + max((shelf.width for shelf in shelves), default=0.0) + MARGIN
    return Drawing(width, (shelves[-1].bottom if shelves else top) + MARGIN, tuple(clusters), tuple(wires))


def _shelves(picture: Picture) -> list[_Shelf]:
    shelves: list[_Shelf] = []
    for cluster in picture.clusters:
        rows = _rows(cluster.boxes)
        inner = [sum(map(width_of_box, row)) + GAP * (len(row) - 1) for row in rows]
        texts = [width_of(cluster.title, "title") + GAP + width_of(_times(cluster), "title")]
        texts += [width_of(fact, "fact") for fact in cluster.facts]
        width = max(inner + texts) + 2 * PAD
        last = shelves[-1] if shelves else None
        own = {id(box) for box in cluster.boxes}
        # lines of its own begin at the left, and would run past other clusters
        first = not cluster.names or any(all(id(p.box) in own for p in line.ports) for line in picture.lines)
        full = last is None or len(last.bands) > 1 or last.width + GAP + width > WIDTH
        if last is None or full or first or len(rows) > 1:
            last = _Shelf([])
            shelves.append(last)
        last.clusters.append((cluster, rows, width))
        for row, boxes in enumerate(rows):
            if row == len(last.bands):
                last.bands.append(_Band())
            last.bands[row].boxes += boxes
    return shelves


def _rows(boxes: Sequence[Box]) -> list[list[Box]]:
    rows: list[list[Box]] = []
    free = 0.0
    for box in boxes:
        if not rows or width_of_box(box) > free:
            rows.append([])
            free = WIDTH - 2 * PAD
        rows[-1].append(box)
        free -= width_of_box(box) + GAP
    return rows


def _stack(shelves: Sequence[_Shelf], top: float) -> None:
    """Heights, from above."""
    for shelf in shelves:
        shelf.top = top
        y = top + max(_head(cluster) for cluster, *_ in shelf.clusters)
        for band in shelf.bands:
            band.bottom = y + band.height
            y = band.bottom + band.gutter
        shelf.bottom = y if shelf.bands else y + PAD
        top = shelf.bottom + GAP + 4


def _reach(line: Line, bands: Sequence[_Band]) -> tuple[float, float]:
    """From the top of its label, which is beside the boxes, where no other line is, to its last band."""
    return bands[0].bottom - PAD - width_of(line.label, "wire"), bands[-1].level(line)


def _columns(lanes: Sequence[Line], where: dict[Line, list[_Band]]) -> dict[Line, int]:
    """Streams first; lines that do not meet may have the same column."""
    taken: list[list[tuple[float, float]]] = []
    columns = {}
    reaches = {line: _reach(line, where[line]) for line in lanes}
    for line in sorted(lanes, key=lambda line: (line.kind != "stream", reaches[line][0] - reaches[line][1])):
        low, high = reaches[line]
        free = (c for c, spans in enumerate(taken) if all(high + PAD < a or b + PAD < low for a, b in spans))
        if (column := next(free, len(taken))) == len(taken):
            taken.append([])
        taken[column].append((low, high))
        columns[line] = column
    return columns


def _clusters(shelf: _Shelf, x: float) -> Iterator[PlacedCluster]:
    for cluster, rows, width in shelf.clusters:
        texts = [Text(x + PAD, shelf.top + 21, cluster.title, "title")]
        if _times(cluster):
            texts.append(Text(texts[0].x + texts[0].width + GAP, shelf.top + 21, _times(cluster), "title"))
        for fact in cluster.facts:
            texts.append(Text(x + PAD, texts[-1].y + 16, fact, "fact"))
        boxes = []
        for band, row in zip(shelf.bands, rows):
            left = x + PAD
            for box in row:
                boxes.append(place_box(box, left, band.bottom - height_of_box(box)))
                left += width_of_box(box) + GAP
        yield PlacedCluster(cluster, x, shelf.top, width, shelf.bottom - shelf.top, tuple(texts), tuple(boxes))
        x += width + GAP


def _wire(
    line: Line, colour: int, bands: Sequence[_Band], lane: float | None, left: float, boxes: dict[int, PlacedBox]
) -> Wire:
    start = left if lane is None else lane
    path, dots = [], []
    for band in bands:
        inside = {id(box) for box in band.boxes}
        ends = []
        for port in line.ports:
            if id(port.box) in inside:
                placed = boxes[id(port.box)]
                same = [other for other in band.lines if any(p == port for p in other.ports)]
                beside = same.index(line) - (len(same) - 1) / 2
                ends.append((placed.port(port.dim) + 5 * beside, placed.y + placed.height))
        level = band.level(line)
        path.append(f"M{start:g} {level:g}H{max(x for x, _ in ends):g}")
        path += [f"M{x:g} {y:g}V{level:g}" for x, y in ends]
        dots += [(x, level) for x, _ in ends]
        if lane is not None:
            dots.append((lane, level))
    first, last = bands[0].level(line), bands[-1].level(line)
    if lane is None:
        label = Text(left - width_of(line.label, "wire") - 4, first + 3.5, line.label, "wire")
    else:
        path.append(f"M{lane:g} {bands[0].bottom:g}V{last:g}")
        label = Text(lane + 3.5, bands[0].bottom - 4, line.label, "wire")
    return Wire(line, colour, "".join(path), tuple(dots), label, lane is not None)


def _head(cluster: Cluster) -> float:
    return 32.0 + 16.0 * len(cluster.facts)


def _times(cluster: Cluster) -> str:
    return f"× {len(cluster.names)}" if len(cluster.names) > 1 else ""
