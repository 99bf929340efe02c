"""Axes: what the index of a tensor's dimension means, and how operations tie one to another.

A dimension is a product of axes, the outermost first; () is a dimension of size 1. An axis is a leaf, or it has turned
out to be made of others: a product (a reshape split it: heads x entries) or a sum (a slice cut it, a concatenation
joined it: queries, keys, values). Axes that an operation ties together become one, with all that is known of both:

    q = linear(x).view(B, T, H, E)       rows of the weight: (F,)      F := H x E
    o = linear(y.view(B, T, H * E))      columns of the next: (H, E)   so both weights share H and E
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

Dim = tuple["Axis", ...]

MOST_PARTS = 256
"""Parts of a sum beyond which an axis is not followed: shifts by one index would cut it into single ones."""

MOST_STEPS = 200
"""Ties that one operation may cause; shifts by one index would cause as many as there are indices."""


class Uncoupled(Exception):
    """These dimensions cannot be tied or followed; the text says why."""


class Axis:
    """Identity matters: two dimensions with a leaf in common are coupled."""

    __slots__ = ("layered", "product", "same", "size", "total")

    def __init__(self, size: int, total: tuple[Dim, ...] | None = None) -> None:
        self.size = size
        self.layered = False
        """Whether a layer makes it or reads it."""
        self.product: Dim | None = None
        self.total = total
        """Parts that lie one behind the other."""
        self.same: Axis | None = None
        """The axis that this one has become."""


def fresh(size: int) -> Dim:
    return (Axis(size),) if size != 1 else ()


def size_of(dim: Sequence[Axis]) -> int:
    return math.prod(axis.size for axis in dim)


def factors(dim: Sequence[Axis]) -> list[Axis]:
    """The dimension as leaves and sums."""
    found: list[Axis] = []
    for axis in dim:
        axis = _resolve(axis)
        if axis.product is not None:
            found += factors(axis.product)
        elif axis.size != 1:
            found.append(axis)
    return found


def leaves(dim: Sequence[Axis]) -> Iterator[Axis]:
    """Every leaf in it, from the outermost; one that occurs twice comes twice."""
    for axis in factors(dim):
        if axis.total is None:
            yield axis
        else:
            for part in axis.total:
                yield from leaves(part)


def reshape(dims: Sequence[Dim], sizes: Sequence[int]) -> list[Dim]:
    """The dimensions of a tensor after a reshape to `sizes`, splitting axes where it does. Raises Uncoupled."""
    rest = factors([axis for dim in dims for axis in dim])
    result: list[Dim] = []
    for size in sizes:
        taken: list[Axis] = []
        while (left := size // max(1, size_of(taken))) > 1:
            if not rest:
                raise Uncoupled("a reshape of another number of elements")
            axis = rest.pop(0)
            if left % axis.size == 0:
                taken.append(axis)
            elif axis.size % left == 0:
                rest = [*_split(axis, left), *rest]
            else:
                raise Uncoupled(f"a reshape that joins parts of {axis.size} into {size}")
        result.append(tuple(taken))
    return result


def cut_out(dim: Sequence[Axis], start: int, stop: int, step: int = 1) -> Dim:
    """Entries start:stop:step of a dimension, cutting axes where it does. Raises Uncoupled."""
    size = size_of(dim)
    if step != 1:
        if size % step or start >= step or -(-(stop - start) // step) != size // step:
            raise Uncoupled(f"a slice with step {step}")
        return reshape([tuple(dim)], [size // step, step])[0]
    if (start, stop) == (0, size):
        return tuple(dim)
    if stop - start <= 1:
        return ()
    axes = factors(dim)
    inner = size_of(axes[1:])
    if start % inner == 0 and stop % inner == 0:
        return (*_cut_axis(axes[0], start // inner, stop // inner), *axes[1:])
    if start // inner == (stop - 1) // inner:
        return cut_out(axes[1:], start % inner, (stop - 1) % inner + 1)
    raise Uncoupled(f"a slice {start}:{stop} through blocks of {inner}")


def join(parts: Sequence[Dim]) -> Dim:
    """The dimension of a concatenation."""
    return tuple(parts[0]) if len(parts) == 1 else (Axis(sum(map(size_of, parts)), tuple(parts)),)


def tie(a: Sequence[Axis], b: Sequence[Axis]) -> None:
    """Make two dimensions of equal size one. Raises Uncoupled, with some of their parts tied already."""
    _tie(a, b, [MOST_STEPS])


def _tie(a: Sequence[Axis], b: Sequence[Axis], steps: list[int]) -> None:
    ours, theirs = factors(a), factors(b)
    if size_of(ours) != size_of(theirs):
        raise Uncoupled(f"dimensions of {size_of(ours)} and {size_of(theirs)}")
    while ours and theirs:
        x, y = ours.pop(0), theirs.pop(0)
        if x.size == y.size:
            _tie_axes(x, y, steps)
            # what was tied may have split what comes next
            ours, theirs = factors(ours), factors(theirs)
        elif x.size % y.size == 0:
            ours, theirs = [*_split(x, y.size), *ours], [y, *theirs]
        elif y.size % x.size == 0:
            ours, theirs = [x, *ours], [*_split(y, x.size), *theirs]
        else:
            raise Uncoupled(f"blocks of {x.size} and of {y.size}")


def _tie_axes(x: Axis, y: Axis, steps: list[int]) -> None:
    x, y = _resolve(x), _resolve(y)
    steps[0] -= 1
    if steps[0] < 0:
        raise Uncoupled("too many parts tied to one another")
    if x is y:
        return
    if x.product is not None or y.product is not None:
        _tie((x,), (y,), steps)
    elif x.total is None:
        _become(x, y)
    elif y.total is None:
        _become(y, x)
    else:
        _tie_sums(x, y, steps)


def _become(x: Axis, y: Axis) -> None:
    x.same = y
    if x.layered:
        mark_layered((y,))


def mark_layered(dim: Sequence[Axis]) -> None:
    for leaf in leaves(dim):
        leaf.layered = True


def _tie_sums(x: Axis, y: Axis, steps: list[int]) -> None:
    """Part by part, cutting the longer one where the shorter one ends."""
    assert x.total is not None and y.total is not None
    for start, stop in _between(_edges(x.total) | _edges(y.total)):
        _tie(cut_out((x,), start, stop), cut_out((y,), start, stop), steps)
    x, y = _resolve(x), _resolve(y)
    if x is not y and x.product is None and y.product is None:
        x.same = y


def _resolve(axis: Axis) -> Axis:
    while axis.same is not None:
        if axis.same.same is not None:
            axis.same = axis.same.same
        axis = axis.same
    return axis


def _split(axis: Axis, outer: int) -> list[Axis]:
    """Turn a leaf or a sum into a product whose outermost factor has this size, and return its factors."""
    inner = axis.size // outer
    if axis.total is None:
        axis.product = (*fresh(outer), *fresh(inner))
        if axis.layered:
            mark_layered(axis.product)
        return factors(axis.product)
    parts = axis.total
    if all(size_of(part) % inner == 0 for part in parts) and any(size_of(part) != inner for part in parts):
        pairs = [reshape([part], [size_of(part) // inner, inner]) for part in parts]
        heads, common = join([head for head, _ in pairs]), [tail for _, tail in pairs]
    else:  # equal pieces, each of one part or of several
        edges = range(0, axis.size + 1, inner)
        if not set(edges) <= _edges(parts):
            raise Uncoupled(f"a reshape of parts of {', '.join(str(size_of(p)) for p in parts)} into rows of {inner}")
        heads, common = fresh(outer), [cut_out((axis,), start, start + inner) for start in edges[:-1]]
    for piece in common[1:]:
        tie(common[0], piece)
    axis.total, axis.product = None, (*heads, *common[0])
    return factors(axis.product)


def _cut_axis(axis: Axis, start: int, stop: int) -> Dim:
    """Indices start:stop of a leaf or a sum."""
    if stop - start <= 1:
        return ()
    if (start, stop) == (0, axis.size):
        return (axis,)
    old = axis.total or ((axis,),)
    edges = _edges(old)
    new = _between(edges | {start, stop})
    if len(new) > MOST_PARTS:
        raise Uncoupled(f"an axis in more than {MOST_PARTS} parts")
    if axis.total is None:
        axis.total = tuple(fresh(hi - lo) for lo, hi in new)
        if axis.layered:
            mark_layered((axis,))
    elif not {start, stop} <= edges:
        parts: list[Dim] = []
        for (lo, hi), part in zip(_between(edges), old):
            inside = [(a - lo, b - lo) for a, b in new if lo <= a and b <= hi]
            parts += [cut_out(part, a, b) for a, b in inside]
        axis.total = tuple(parts)
    covered = [part for (lo, hi), part in zip(new if axis.total else [], axis.total) if start <= lo and hi <= stop]
    return join(covered)


def _edges(parts: Sequence[Dim]) -> set[int]:
    """Where parts begin and end."""
    edges = {0}
    at = 0
    for part in parts:
        at += size_of(part)
        edges.add(at)
    return edges


def _between(edges: set[int]) -> list[tuple[int, int]]:
    ordered = sorted(edges)
    return list(itertools.pairwise(ordered))
