"""One walk over the forward part of a joint graph, and what it finds; rules work on it, node by node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import fx

from ..nodes import hint
from .axes import Axis, Dim, Uncoupled, fresh, leaves, mark_layered, tie

Dims = list[Dim]
"""Of one tensor."""

AnyRule = TypeVar("AnyRule", bound=Callable[..., Any])

_ENDING: set[Callable[..., Any]] = set()


def ends(rule: AnyRule) -> AnyRule:
    """Mark a rule whose outputs need not have all axes of its inputs: it sums over some, or takes a part of them.

    What any other rule leaves out is `untraced`.
    """
    _ENDING.add(rule)
    return rule


@dataclass(frozen=True, slots=True)
class Layer:
    """A product of an activation with something computed from parameters alone: a linear layer, a convolution ..."""

    node: fx.Node
    weights: frozenset[str]
    kind: str
    """linear, convolution or embedding."""
    rows: Dim
    """What it makes: features, filters."""
    columns: Dim
    """What it sums over; the entries that are looked up, of an embedding."""
    batch: Dim
    """What it has one weight matrix for each of: experts, heads, groups of filters."""
    bit: int
    """Stands for it in an Origin."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value comes from, as bits: which layers and inputs made it, and which came before those."""

    nearest: int = 0
    past: int = 0

    def __or__(self, other: Origin) -> Origin:
        return Origin(self.nearest | other.nearest, self.past | other.past)

    def follows(self, other: Origin) -> bool:
        """Whether a layer that made this value has seen what made the other."""
        return bool(self.past & other.nearest)


@dataclass
class Coupling:
    """What the dimensions of the parameters mean; filled node by node."""

    params: dict[str, Dims] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    streams: list[Dim] = field(default_factory=list)
    """Dimensions along which a layer's output is added to what it was computed from."""
    heads: list[Dim] = field(default_factory=list)
    """Dimensions that products of two activations treat as a batch."""
    inner: list[Dim] = field(default_factory=list)
    """Dimensions that products of two activations sum over."""
    origins: dict[str, Origin] = field(default_factory=dict)
    """Bias, or scale and shift of channels -> where the value comes from that it is added to or multiplied with."""
    untraced: Counter[str] = field(default_factory=Counter)
    """What could not be followed, and how often."""
    lost: list[Dim] = field(default_factory=list)
    """Dimensions that went into it."""
    nodes: int = 0
    """Nodes of the joint graph."""


class Walk:
    """One walk over a graph; what the rules work on."""

    def __init__(self, names: Mapping[fx.Node, str], wanted: Set[fx.Node]) -> None:
        self.found = Coupling()
        self._names = names
        self._wanted = wanted
        self._reused: set[fx.Node] = set()
        self._dims: dict[tuple[fx.Node, int], Dims] = {}
        self._origin: dict[fx.Node, Origin] = {}
        self._weights: dict[fx.Node, frozenset[str]] = {}
        self._bits = 0
        self._made_by_layers = 0
        self._with_params: set[fx.Node] = set()

    def dims(self, node: Any, output: int = 0) -> Dims:
        """The dimensions of a tensor, or of one of several outputs."""
        return self._dims[node, output]

    def weights(self, node: Any) -> frozenset[str]:
        """The parameters that a value is computed from, if from nothing else."""
        return self._weights.get(node, frozenset()) if isinstance(node, fx.Node) else frozenset()

    def is_activation(self, node: fx.Node) -> bool:
        """Whether a value depends on more than parameters and constants."""
        return node not in self._weights

    def origin(self, node: Any) -> Origin:
        return self._origin.get(node, Origin()) if isinstance(node, fx.Node) else Origin()

    def layer(self, node: fx.Node, weight: Any, kind: str, *, rows: Dim, columns: Dim, batch: Dim = ()) -> None:
        """Note that this node is a layer with the weight that the node `weight` computes."""
        before = self._origin_of(node)
        origin = self._origin[node] = self._bit(before.nearest | before.past)
        self._made_by_layers |= origin.nearest
        mark_layered((*rows, *columns, *batch))
        self.found.layers.append(Layer(node, self.weights(weight), kind, rows, columns, batch, origin.nearest))

    def has_layers(self, node: fx.Node) -> bool:
        """Whether some layer had a part in a value."""
        origin = self.origin(node)
        return bool((origin.nearest | origin.past) & self._made_by_layers)

    def has_params(self, node: fx.Node) -> bool:
        """Whether some parameter had a part in a value."""
        return node in self._with_params

    def reused(self, node: fx.Node) -> bool:
        """Whether a value, or one that it was made from, is read in several places of the forward pass."""
        return node in self._reused

    def constant(self, node: fx.Node) -> None:
        """Note that no value that it is given has a part in what a node makes."""
        self._weights[node] = frozenset()
        self._origin[node] = Origin()
        self._with_params.discard(node)

    def shared(self, node: fx.Node) -> bool:
        """Whether a value is common to layers, with no layer's part in it: a mask, rotary angles, zeros to add to."""
        if self.has_layers(node) or any(leaf.layered for leaf in leaf_set(self.dims(node))):
            return False
        return self.reused(node) or not self.has_params(node)

    def added(self, dims: Sequence[Dim], a: Any, b: Any) -> None:
        """Note that two values are added: along a stream where one was computed from the other."""
        first, second = self.origin(a), self.origin(b)
        if first.follows(second) or second.follows(first):
            self.found.streams += [dim for dim in dims if dim]

    def _bit(self, past: int = 0) -> Origin:
        self._bits += 1
        return Origin(1 << (self._bits - 1), past)

    def visit(self, node: fx.Node, rules: Mapping[Any, Any]) -> None:
        if sum(user in self._wanted for user in node.users) > 1 or any(n in self._reused for n in node.all_input_nodes):
            self._reused.add(node)
        if node.op == "placeholder":
            self._input(node)
            return
        shapes = _shapes(node)
        if not shapes or node.op == "output":
            return
        for output, shape in shapes.items():
            self._dims[node, output] = [fresh(size) for size in shape]
        self._origin[node] = self._origin_of(node)
        inputs = [n for n in node.all_input_nodes if _shapes(n)]
        if any(n in self._with_params for n in inputs):
            self._with_params.add(node)
        known = [self.weights(n) for n in inputs if n in self._weights]
        if inputs and len(known) == len(inputs):
            self._weights[node] = frozenset().union(*known)
        elif not inputs:
            self._weights[node] = frozenset()  # a constant goes with both
        if node.op == "get_attr":
            return
        try:
            rule = rules[_packet(node.target)]
        except KeyError:
            self.untraced(node, f"{node.target} is not known")
            return
        try:
            made = rule(self, node)
        except Uncoupled as reason:
            self.untraced(node, f"{node.target}: {reason}")
        except Exception as error:  # an argument of a kind that the rule did not expect: safe is to follow no further
            self.untraced(node, f"{node.target}: {type(error).__name__}")
        else:
            for output, dims in enumerate(made):
                if dims is not None and (node, output) in self._dims:
                    self._dims[node, output] = list(dims)
            if rule not in _ENDING:
                self._check(node, inputs, shapes)

    def _check(self, node: fx.Node, inputs: Iterable[fx.Node], outputs: Iterable[int]) -> None:
        """Name an operation that lets axes of layers and weights fall, though it has a rule."""
        if not _is_differentiable(node):
            return
        left = leaf_set([dim for output in outputs for dim in self._dims[node, output]])
        for source in filter(_is_differentiable, inputs):
            for output in _shapes(source):
                if gone := [dim for dim in self._dims[source, output] if self.matters(source, dim, left)]:
                    self.found.untraced[f"{node.target}: entries are others afterwards"] += 1
                    self.found.lost += gone

    def matters(self, source: fx.Node, dim: Dim, left: Set[Axis] = frozenset()) -> bool:
        """Whether a dimension of `source` has axes that layers or weights have, besides those that are left."""
        return any((leaf.layered or self.weights(source)) and leaf not in left for leaf in leaves(dim))

    def lose(self, node: fx.Node, reason: Uncoupled, dim: Dim) -> None:
        """Nothing is known of one dimension of a node, which was made from `dim`."""
        self.found.untraced[f"{node.target}: {reason}"] += 1
        self.found.lost.append(dim)

    def untraced(self, node: fx.Node, reason: str) -> None:
        """Nothing is known of what this node makes."""
        self.found.untraced[reason] += 1
        for input_node in node.all_input_nodes:
            for output in _shapes(input_node):
                self.found.lost += self._dims.get((input_node, output), [])
        self.found.lost += [dim for output in _shapes(node) for dim in self._dims[node, output]]

    def _input(self, node: fx.Node) -> None:
        for output, shape in _shapes(node).items():
            self._dims[node, output] = [fresh(size) for size in shape]
        if name := self._names.get(node):
            self._weights[node] = frozenset((name,))
            self._with_params.add(node)
            self.found.params[name] = self._dims[node, 0]
        elif _shapes(node):
            self._origin[node] = self._bit()

    def _origin_of(self, node: fx.Node) -> Origin:
        origin = Origin()
        for input_node in node.all_input_nodes:
            origin |= self.origin(input_node)
        return origin


def tie_shapes(result: Sequence[Dim], *operands: Sequence[Dim]) -> None:
    """Tie what broadcasts together: dimensions are matched from the last; those of size 1 stay out."""
    for dims in operands:
        for ours, theirs in zip(reversed(result), reversed(dims)):
            if theirs and ours:
                tie(ours, theirs)


def leaf_set(dims: Sequence[Dim]) -> set[Axis]:
    return {leaf for dim in dims for leaf in leaves(dim)}


def _packet(target: Any) -> Any:
    return getattr(target, "overloadpacket", target)


def _shapes(node: fx.Node) -> dict[int, tuple[int, ...]]:
    """Output -> sizes of every tensor that a node makes."""
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else (value,)
    return {i: tuple(map(hint, v.shape)) for i, v in enumerate(values) if isinstance(v, torch.Tensor)}


def _is_differentiable(node: fx.Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(v, torch.Tensor) and (v.is_floating_point() or v.is_complex()) for v in values)


def outputs(node: fx.Node) -> int:
    value = node.meta["val"]
    return len(value) if isinstance(value, (tuple, list)) else 1


def packets(space: Any, names: str) -> list[Any]:
    """The operations of these names, as far as this torch has them."""
    return [getattr(space, name) for name in names.split() if hasattr(space, name)]
