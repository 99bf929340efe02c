"""What shared axes mean: which of them are hidden units, which the residual stream, and which one owns each weight.

A weight is owned along one of its dimensions: that whose axis is local. `up` [F, D] of an MLP has the hidden neurons F
and the stream D, which every layer reads and adds to; F is local, so `up` is owned by rows and `down` by columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations

import numpy as np

from ..plan import WeightGrad
from .axes import Axis, Dim, factors, leaves, size_of
from .walk import Coupling, Layer, leaf_set

THINNEST = 16
"""Neighbouring rows below which a block costs more to handle than it saves."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a dimension that belong to one axis."""

    leaf: Axis
    units: np.ndarray
    """int [rows]: which index of the axis each row belongs to; -1 where it belongs to another."""


@dataclass(frozen=True, slots=True)
class Owner:
    """One weight, and the axes that own its rows along `grad.dim`."""

    grad: WeightGrad
    parts: tuple[Part, ...]
    standalone: bool
    """These axes are the stream's: the weight's rows are a group by themselves."""


class Components:
    """All that is asked about the leaves of one coupling."""

    def __init__(self, coupling: Coupling) -> None:
        self.coupling = coupling
        self.streams = leaf_set(coupling.streams)
        self.heads = leaf_set(coupling.heads)
        self.inner = leaf_set(coupling.inner)
        self.lost = leaf_set(coupling.lost)
        self.made: dict[Axis, list[Layer]] = defaultdict(list)
        self.read: dict[Axis, list[Layer]] = defaultdict(list)
        self.batched: dict[Axis, list[Layer]] = defaultdict(list)
        self.tokens: set[Axis] = set()
        self._weights: dict[Axis, set[str]] = {}
        self._parts: dict[Dim, list[Part]] = {}
        self._first: dict[Axis, int] = {}
        self._last: dict[Axis, int] = {}
        for number, layer in enumerate(coupling.layers):
            for roles, dim in ((self.made, layer.rows), (self.read, layer.columns), (self.batched, layer.batch)):
                for leaf in leaf_set([dim]):
                    roles[leaf].append(layer)
                    self._first.setdefault(leaf, number)
                    self._last[leaf] = number
            if layer.kind == "embedding":
                self.tokens |= leaf_set([layer.columns])
        self.vocabularies = {leaf.size for leaf in self.tokens}
        self.streams -= self._local()

    @cached_property
    def members(self) -> dict[Axis, list[tuple[str, int]]]:
        """Leaf -> the (parameter, dimension) pairs it occurs in, in the graph's order."""
        found: dict[Axis, list[tuple[str, int]]] = defaultdict(list)
        for name, dims in self.coupling.params.items():
            for d, dim in enumerate(dims):
                for leaf in dict.fromkeys(leaves(dim)):  # a set would have another order in each run
                    found[leaf].append((name, d))
        return found

    def weights(self, leaf: Axis) -> set[str]:
        """Parameters of two or more dimensions that it occurs in."""
        if leaf not in self._weights:
            self._weights[leaf] = {name for name, _ in self.members[leaf] if len(self.coupling.params[name]) > 1}
        return self._weights[leaf]

    def parts(self, dim: Sequence[Axis]) -> list[Part]:
        """The axes that own a dimension's rows: of a product the one that most weights share, then the outermost."""
        key = tuple(dim)
        if key not in self._parts:
            self._parts[key] = self._find_parts(key)
        return self._parts[key]

    def _find_parts(self, dim: Dim) -> list[Part]:
        axes = factors(dim)
        best: list[Part] = []
        most = -1
        at = 0
        for i, axis in enumerate(axes):
            if axis.total is None:
                options = [Part(axis, np.arange(axis.size))]
            else:
                options = _side_by_side([(self.parts(part), size_of(part)) for part in axis.total])
            shared = max((len(self.weights(part.leaf)) for part in options), default=-1)
            if shared > most:
                best, most, at = options, shared, i
        outer, inner = size_of(axes[:at]), size_of(axes[at + 1 :])
        return [Part(part.leaf, np.tile(np.repeat(part.units, inner), outer)) for part in best]

    def owners(self, candidates: Iterable[WeightGrad]) -> list[Owner]:
        """The dimensions along which one weight could be cut, the best first."""
        options = []
        for grad in candidates:
            dims = self.coupling.params.get(grad.param.name)
            if parts := self.parts(dims[grad.dim]) if dims else []:
                options.append((grad, parts, max(parts, key=lambda part: int((part.units >= 0).sum())).leaf))
        scored = []
        for grad, parts, leaf in options:
            stream = leaf in self.streams
            columns = not any(grad.param.name in layer.weights for layer in self.made[leaf] + self.batched[leaf])
            thick = grad.param.shape[grad.dim] * max(product.inner for product in grad.products)
            score = (
                columns and thick < THINNEST,
                leaf not in self.tokens and self.kind(leaf) != "experts",
                stream,
                not self.hidden(leaf),
                columns,
                -len(self.weights(leaf)),
            )
            scored.append((score, Owner(grad, tuple(parts), stream)))
        return [owner for _, owner in sorted(scored, key=lambda pair: pair[0])]

    def hidden(self, leaf: Axis) -> bool:
        """Whether something makes it and something reads it, or weights have one matrix for each of it."""
        return bool(self.made[leaf] and self.read[leaf]) or bool(self.batched[leaf]) or leaf in self.inner

    def _local(self) -> set[Axis]:
        """Streams of their own inside a longer one: all layers that know them lie between two that know the other.

        The channels of a state space layer are added to what was computed from them, but within one layer.
        """
        found = set()
        for layer in self.coupling.layers:
            for leaf, other in permutations(leaf_set([layer.rows]) | leaf_set([layer.columns]), 2):
                inside = self._first[other] < self._first[leaf] and self._last[leaf] < self._last[other]
                if inside and leaf in self.streams and other in self.streams:
                    found.add(leaf)
        return found

    def kind(self, leaf: Axis) -> str:
        """What people call one of it: heads, experts, tokens, filters, neurons, outputs; "" where nobody knows."""
        if leaf in self.heads:
            return "heads"
        if leaf in self.tokens:
            return "tokens"
        makers = [layer for layer in self.made[leaf] if layer.kind != "embedding"]
        if any(layer.kind == "linear" for layer in self.batched[leaf]):
            return "experts"
        if makers and makers[0].kind == "convolution":
            return "filters"
        if self.hidden(leaf):
            return "neurons"
        if not makers or leaf in self.lost:
            return ""
        return "tokens" if leaf.size in self.vocabularies else "outputs"


def _side_by_side(parts: Sequence[tuple[list[Part], int]]) -> list[Part]:
    """Parts of a sum: those of one axis (gate and up in one weight) become one."""
    total = sum(size for _, size in parts)
    found: dict[Axis, np.ndarray] = {}
    at = 0
    for inside, size in parts:
        for part in inside:
            found.setdefault(part.leaf, np.full(total, -1))[at : at + size] = part.units
        at += size
    return [Part(leaf, units) for leaf, units in found.items()]


def stretch(labels: np.ndarray, edges: Iterable[int] = ()) -> int:
    """The largest block size with which no block has two labels, or an edge inside; all rows if there is one label."""
    changes = [*(np.flatnonzero(np.diff(labels)) + 1).tolist(), *edges]
    return int(np.gcd.reduce(changes)) if changes else len(labels)
