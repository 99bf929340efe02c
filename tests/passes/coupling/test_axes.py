"""The algebra of axes against a labelled tensor: which entry of a parameter does each entry of a view come from?

Random reshapes, permutations, slices and concatenations are done to a numpy array of indices and to dimensions. What
an axis says of an index must be what the array says, also of dimensions that were split, cut and tied later on.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacompile.passes.coupling.axes import (
    MOST_PARTS,
    Dim,
    Uncoupled,
    cut_out,
    factors,
    fresh,
    join,
    leaves,
    reshape,
    size_of,
    tie,
)
from cacompile.passes.coupling.components import Components
from cacompile.passes.coupling.walk import Coupling

Meaning = frozenset[tuple[int, int]]
"""(leaf, index along it) pairs: what is known of one entry."""


def meanings(dim: Dim) -> list[Meaning]:
    """What a dimension says of each of its indices; written apart from what the passes do."""
    found: list[Meaning] = [frozenset()]
    for axis in factors(dim):
        if axis.total is None:
            own: list[Meaning] = [frozenset([(id(axis), i)]) for i in range(axis.size)]
        else:
            own = [meaning for part in axis.total for meaning in meanings(part)]
        found = [outer | inner for outer in found for inner in own]
    return found


@dataclass
class View:
    """A tensor made of one parameter's entries."""

    dims: list[Dim]
    labels: np.ndarray
    """For each entry, its flat index in the parameter."""
    whole: bool = True
    """Nothing was sliced: all that is known of the parameter's entries is known of this one's."""

    def meanings(self) -> dict[tuple[int, ...], Meaning]:
        each = [meanings(dim) for dim in self.dims]
        return {
            at: frozenset().union(*(known[i] for known, i in zip(each, at))) for at in np.ndindex(self.labels.shape)
        }


def agree(view: View, parameter: View, told: Callable[[Meaning, Meaning], bool] = frozenset.__le__) -> None:
    """Every entry is known as what it is in the parameter; what is new in the view belongs to nobody."""
    own = {id(leaf) for dim in parameter.dims for leaf in leaves(dim)}
    known = list(parameter.meanings().values())
    assert tuple(map(size_of, view.dims)) == view.labels.shape
    for at, meaning in view.meanings().items():
        assert told(frozenset(pair for pair in meaning if pair[0] in own), known[view.labels[at]])


SIZES = (2, 3, 4, 6, 8, 12)
shapes = st.lists(st.sampled_from(SIZES), min_size=1, max_size=3).filter(lambda shape: math.prod(shape) <= 96)


@st.composite
def factorized(draw: st.DrawFn, number: int) -> list[int]:
    """A shape with this many entries."""
    shape = []
    while number > 1:
        size = draw(st.sampled_from([n for n in range(2, number + 1) if number % n == 0]))
        shape.append(size)
        number //= size
    return draw(st.permutations([*shape, *([1] * draw(st.booleans()))]))


def step(data: st.DataObject, view: View, kinds: str = "reshape permute slice swap stack") -> View:
    """What one operation makes of a view. Raises Uncoupled."""
    kind = data.draw(st.sampled_from(kinds.split()))
    dims, labels = view.dims, view.labels
    if kind == "reshape":
        shape = data.draw(factorized(labels.size))
        return View(reshape(dims, shape), labels.reshape(shape), view.whole)
    if kind == "permute":
        order = data.draw(st.permutations(range(labels.ndim)))
        return View([dims[d] for d in order], labels.transpose(order), view.whole)
    large = [d for d, size in enumerate(labels.shape) if size > 1]
    if not large:
        return view
    along = data.draw(st.sampled_from(large))
    before, dim, after, size = dims[:along], dims[along], dims[along + 1 :], labels.shape[along]
    if kind == "stack":  # both halves, one behind the other
        halves = [range(size // 2), range(size // 2, size // 2 * 2)]
        parts = [cut_out(dim, half.start, half.stop) for half in halves]
        tie(*parts)
        return View([fresh(2), *before, parts[0], *after], np.stack([labels.take(h, along) for h in halves]), False)
    start = data.draw(st.integers(0, size - 1))
    if kind == "slice":
        stop, by = data.draw(st.integers(start + 1, size)), data.draw(st.sampled_from([1, 1, 2]))
        part = cut_out(dim, start, stop, by)
        return View([*before, part, *after], labels.take(range(start, stop, by), along), False)
    runs = [run for run in (range(start, size), range(start)) if run]
    simple = all(axis.total is None for axis in factors(dim)) and len(factors(dim)) == 1
    made = join([cut_out(dim, run.start, run.stop) for run in runs])
    whole = view.whole and simple and min(map(len, runs)) > 1
    return View([*before, made, *after], np.concatenate([labels.take(run, along) for run in runs], along), whole)


def parameter(*shape: int) -> View:
    return View([fresh(size) for size in shape], np.arange(math.prod(shape)).reshape(shape))


@settings(derandomize=True, max_examples=300, deadline=None)
@given(shape=shapes, data=st.data())
def test_views_know_where_their_entries_come_from(shape: list[int], data: st.DataObject) -> None:
    first = parameter(*shape)
    views = [first]
    for _ in range(data.draw(st.integers(1, 6))):
        with contextlib.suppress(Uncoupled):
            views.append(step(data, data.draw(st.sampled_from(views))))
            if views[-1].whole:  # later steps may tell apart what this one does not
                agree(views[-1], first, frozenset.__eq__)
        # the older ones as well: their axes may have been split or cut by this step, even if it failed
        for view in views:
            agree(view, first)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(size=st.sampled_from([12, 16, 24, 36]), data=st.data())
def test_tied_views_are_one_and_owners_say_so(size: int, data: st.DataObject) -> None:
    """Two parameters whose entries were moved about each, then tied: `Components.parts` gives both the same units."""
    ours, theirs = parameter(size), parameter(size)
    moved = []
    for view in (ours, theirs):
        for _ in range(data.draw(st.integers(0, 3))):
            with contextlib.suppress(Uncoupled):
                view = step(data, view, "reshape permute swap")
        moved.append(View(list(view.dims), view.labels, view.whole))
    with contextlib.suppress(Uncoupled):
        one, two = (reshape(view.dims, [size]) for view in moved)
        tie(*one, *two)
        assert list(map(meanings, one)) == list(map(meanings, two))
        components = Components(Coupling(params={"ours": ours.dims, "theirs": theirs.dims}))
        parts = [{part.leaf: part.units for part in components.parts(view.dims[0])} for view in (ours, theirs)]
        for leaf in parts[0].keys() & parts[1].keys():
            units = np.stack([of[leaf][view.labels.ravel()] for of, view in zip(parts, moved)])
            both = (units >= 0).all(0)
            assert np.array_equal(units[0, both], units[1, both])
    for view, first in zip(moved, (ours, theirs)):
        agree(view, first)
        check_parts(first.dims[0])


def check_parts(dim: Dim) -> None:
    """Each row belongs to one axis at most, and is the unit of it that it says it is."""
    known = [dict(meaning) for meaning in meanings(dim)]
    parts = Components(Coupling(params={"w": [dim]})).parts(dim)
    for row, meaning in enumerate(known):
        told = {id(part.leaf): int(part.units[row]) for part in parts if part.units[row] >= 0}
        assert len(told) <= bool(meaning)
        assert told.items() <= meaning.items()


@given(st.data())
@settings(derandomize=True, max_examples=100, deadline=None)
def test_there_and_back_is_the_same(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    dims = parameter(*shape).dims
    with contextlib.suppress(Uncoupled):
        back = reshape(reshape(dims, data.draw(factorized(math.prod(shape)))), shape)
        assert [list(leaves(dim)) for dim in back] == [list(leaves(dim)) for dim in dims]


@pytest.mark.parametrize("swapped", [False, True])
def test_ties_are_symmetric(swapped: bool) -> None:
    """A weight of queries, keys and values, cut in chunks, against heads times entries."""
    fused, (heads, entries) = fresh(36), (fresh(4), fresh(3))
    for start in (0, 12, 24):
        pair = (cut_out(fused, start, start + 12), (*heads, *entries))
        tie(*(pair[::-1] if swapped else pair))
    assert meanings(fused) == 3 * meanings((*heads, *entries))


@pytest.mark.parametrize(("a", "b"), [(6, 4), (12, 8)])
def test_sizes_that_do_not_divide_are_refused(a: int, b: int) -> None:
    with pytest.raises(Uncoupled):
        tie(fresh(a), fresh(b))
    with pytest.raises(Uncoupled):
        reshape([fresh(a), fresh(b)], [b, a])


def test_too_many_parts_are_refused() -> None:
    long = fresh(4 * MOST_PARTS)
    with pytest.raises(Uncoupled, match="more than"):
        for start in range(0, 4 * MOST_PARTS, 2):
            cut_out(long, start, start + 2)
    assert size_of(long) == len(meanings(long)) == 4 * MOST_PARTS


@pytest.mark.parametrize("size", [300, 2_000, 100_000])
def test_shifts_end_within_bounds(size: int) -> None:
    """Each index tied to the next one: one by one they would all become one."""
    long = fresh(size)
    with contextlib.suppress(Uncoupled):
        tie(cut_out(long, 1, size), cut_out(long, 0, size - 1))
    assert size_of(long) == size
    assert len(list(leaves(long))) <= MOST_PARTS
