"""What training, saving and reporting need of one compiled graph: frozen, picklable, without a node of any graph."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import CodeType
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Partition:
    """How a parameter is parted: blocks of `block` rows along dimension `dim`, `rows` in all; the last may be small."""

    dim: int
    block: int
    rows: int

    @property
    def blocks(self) -> int:
        return -(-self.rows // self.block)

    def spans(self, chosen: np.ndarray, within: tuple[int, int] | None = None) -> Iterator[tuple[int, int]]:
        """(start, length) in rows of each run of chosen blocks. chosen: bool [blocks].

        within: only what lies in these rows, and counted from the first of them.
        """
        low, high = within or (0, self.rows)
        last = 0
        for on, run in itertools.groupby(chosen.tolist()):  # of a few blocks, for which numpy takes longer
            first, last = last, last + sum(1 for _ in run)
            start, stop = max(first * self.block, low), min(last * self.block, high)
            if on and start < stop:
                yield start - low, stop - start


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank has of a parameter that lies in equal pieces on several: piece `index` of them along `dim`."""

    dim: int
    index: int
    pieces: int


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows `start:stop` of a parameter along dimension `dim`."""

    param: str
    dim: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class ParamGroup:
    """Slices that are kept or skipped together: units `start:stop` of one family."""

    name: str
    """`layers.3.mlp.neurons[0:128]`."""
    start: int
    stop: int
    slices: tuple[Slice, ...]
    """Of weights, whose gradients are skipped, then of what belongs to them and is always computed: biases, norms."""
    family: int
    """Index among the graph's families."""
    flops: int = 0
    """dW FLOPs of one backward; symbolic sizes count with the size seen when compiling."""


@dataclass(frozen=True, slots=True)
class ParamFamily:
    """Groups of one kind in one layer."""

    name: str
    """`layers.3.mlp.neurons`."""
    kind: str
    """neurons, heads, filters, experts, tokens or outputs; rows where the graph does not say what they are."""
    makers: tuple[str, ...]
    """Weights that make its units."""
    weights: tuple[str, ...]
    """All weights that its groups are slices of."""
    role_hash: str
    """Equal for families that look alike and lie alike in the graph: the same kind in other layers."""

    @property
    def semantic(self) -> bool:
        return self.kind != "rows"


@dataclass(frozen=True, slots=True)
class StaysDense:
    """A parameter whose gradient is always computed, and why."""

    param: str
    kind: str
    reason: str
    flops: int = 0
    """dW FLOPs of one backward."""


@dataclass(frozen=True, slots=True)
class Monomial:
    """A product of symbolic sizes, such as batch times length, that FLOPs are multiples of; no atoms: 1."""

    text: str
    atoms: tuple[str, ...]
    """As the graph calls them, one for each time it is a factor."""


@dataclass(frozen=True, slots=True)
class SizeSource:
    """Where a backward finds a size: in dimension `dim` of its input at `position`; None: the input is the size."""

    position: int
    dim: int | None

    def read(self, args: Sequence[Any]) -> int:
        value = args[self.position]
        return int(value if self.dim is None else value.shape[self.dim])


FUNCTIONS: Mapping[str, Any] = {"Mod": operator.mod, "PythonMod": operator.mod, "Max": max, "Min": min}
"""What may be called in the formula of a size."""


@dataclass(frozen=True, slots=True)
class DerivedSize:
    """A size that no input has, such as the height behind a stride: a formula of sizes that some have."""

    formula: str
    """In Python, with the names of `of` and of `FUNCTIONS`."""
    of: tuple[tuple[str, SizeSource | DerivedSize], ...]

    def read(self, args: Sequence[Any]) -> int:
        return int(eval(_compiled(self.formula), {**FUNCTIONS}, {name: source.read(args) for name, source in self.of}))


@functools.cache
def _compiled(formula: str) -> CodeType:
    return compile(formula, "<size>", "eval")


@dataclass(frozen=True, slots=True)
class GradLayout:
    """A gradient that can be masked: how its blocks lie among the graph's flags, and what they cost."""

    param: str
    index: int
    """Position among the inputs of Dynamo's graph."""
    partition: Partition
    """Of the whole parameter, also where this rank's graph has a share of it."""
    first_flag: int
    """Index of its first block among all flags of the graph."""
    groups: tuple[int, ...]
    """For each block, which of the graph's groups it belongs to."""
    block_flops: tuple[int, ...]
    """dW FLOPs of each block in one backward, on the rank that has it, with the sizes seen when compiling."""
    coefficients: tuple[tuple[int, ...], ...]
    """For each of the graph's monomials: how many dW FLOPs of each block there are to one of it."""
    follows: str = ""
    """The weight whose product makes this gradient as well: both are masked or neither."""
    window: tuple[int, int] | None = None
    """First and last but one of the blocks that this rank's graph computes; None: all."""

    @property
    def blocks(self) -> int:
        return self.partition.blocks

    @property
    def here(self) -> slice:
        """Those of its blocks that this rank's graph computes, and has flags for."""
        return slice(*(self.window or (0, self.blocks)))

    @property
    def flags(self) -> slice:
        """These blocks among all flags of the graph."""
        return slice(self.first_flag, self.first_flag + self.here.stop - self.here.start)


def gone_with(needed: Iterable[tuple[int, int]], positions: Collection[int]) -> list[int]:
    """The products of a backward, by number, that only the gradients of these inputs need.

    needed: (position of an input, the products that its gradient needs: bit i for the i-th) of each.
    """
    needed = tuple(needed)
    every = functools.reduce(operator.or_, (needs for _, needs in needed), 0)
    kept = functools.reduce(operator.or_, (needs for at, needs in needed if at not in positions), 0)
    return [i for i in range(every.bit_length()) if (every & ~kept) >> i & 1]


@dataclass(frozen=True, slots=True)
class StepLayout:
    """FLOPs of forward pass, dX and dW, and what of them goes where gradients are None."""

    flops: int = 0
    """Of the whole step, with the sizes seen when compiling."""
    coefficients: tuple[float, ...] = (0,)
    """How many of them there are to one of each of the graph's monomials."""
    forward: tuple[float, ...] = (0,)
    """Those of the forward pass."""
    backward: tuple[tuple[float, ...], ...] = ()
    """Those of each product of the backward, dX or dW."""
    compiled: tuple[float, tuple[float, ...]] = (0, ())
    """FLOPs of the forward pass and of each of these products, with the sizes seen when compiling."""
    needed: tuple[tuple[int, int], ...] = ()
    """(position of an input of Dynamo's graph, the products that its gradient needs: bit i for the i-th)."""

    def left_out(self, positions: Collection[int]) -> tuple[float, ...]:
        """What goes of `coefficients` where the gradients of these inputs are None, and all that only they need."""
        gone = [self.backward[i] for i in gone_with(self.needed, positions)]
        return tuple(map(sum, zip(*gone))) or (0,) * len(self.coefficients)

    def as_compiled(self) -> StepLayout:
        """The same where sizes are not to be had: as many FLOPs as with those seen when compiling."""
        forward, backward = self.compiled
        return replace(
            self, coefficients=(self.flops,), forward=(forward,), backward=tuple((each,) for each in backward)
        )

    def in_proportion(self, coefficients: Sequence[int], flops: int) -> StepLayout:
        """The same in proportion to another count, whose `coefficients` are known. flops: that, when compiling."""
        forward, backward = self.compiled

        def like(part: float) -> tuple[float, ...]:
            return tuple(part / max(1, flops) * each for each in coefficients)

        return replace(self, coefficients=like(self.flops), forward=like(forward), backward=tuple(map(like, backward)))


@dataclass(frozen=True)
class MaskLayout:
    """Parameters, blocks, flags, groups and families of one compiled graph, and what of it stays dense."""

    params: tuple[tuple[str, int], ...] = ()
    """(name, position among the inputs of Dynamo's graph) of each trainable parameter."""
    grads: tuple[GradLayout, ...] = ()
    groups: tuple[ParamGroup, ...] = ()
    families: tuple[ParamFamily, ...] = ()
    dense: tuple[StaysDense, ...] = ()
    flops_by_param: tuple[tuple[str, int], ...] = ()
    """dW FLOPs of one backward, masked or not, with the sizes seen when compiling."""
    monomials: tuple[Monomial, ...] = (Monomial("1", ()),)
    """What FLOPs are multiples of in the sizes of a call."""
    coefficients_by_param: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """How many dW FLOPs there are to one of each monomial, masked or not."""
    sources: tuple[tuple[SizeSource | DerivedSize, ...], ...] = ()
    """For each monomial, where a backward finds its factors; empty where no size is symbolic."""
    step: StepLayout = StepLayout()
    """What a whole step of this graph costs."""
    masked: frozenset[str] | None = None
    """Parameters whose products the masked version masks; None until that version was made."""

    @cached_property
    def blocks(self) -> int:
        """Flags of the masked version: blocks of all gradients, as far as this rank computes them."""
        return sum(grad.flags.stop - grad.flags.start for grad in self.grads)

    @cached_property
    def flops(self) -> int:
        """dW FLOPs of one backward of the whole graph, with the sizes seen when compiling."""
        return sum(flops for _, flops in self.flops_by_param)

    @cached_property
    def coefficients(self) -> tuple[int, ...]:
        """How many dW FLOPs of the whole graph there are to one of each monomial."""
        columns = zip(*(coefficients for _, coefficients in self.coefficients_by_param))
        return tuple(map(sum, columns)) or (0,) * len(self.monomials)

    @cached_property
    def coefficients_by_block(self) -> np.ndarray:
        """How many dW FLOPs of each flag's block there are to one of each monomial: int64 [monomials, blocks]."""
        found = np.zeros((len(self.monomials), self.blocks), np.int64)
        for grad in self.grads:
            found[:, grad.flags] = np.array(grad.coefficients, np.int64)[:, grad.here]
        return found

    def sizes_in(self, args: Sequence[Any]) -> Sequence[int]:
        """What the monomials are in a call of the backward with these inputs."""
        if not self.sources:
            return (1,)
        return [math.prod(of.read(args) for of in factors) for factors in self.sources]
