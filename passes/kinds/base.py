"""What is asked of a kind of product: how it is recognised, what it costs, and what stands in its place when masked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from cacompile.kernels.blocks import KERNEL_DTYPES
from cacompile.torch_internals import put_in_part_of, rename

from ..marks import MARK, Mark

Extra = tuple[fx.Node, fx.Node | None]
"""The flags, and the flags in CPU memory or None: arguments of every masked operation."""


class Kind:
    """A kind of product that makes weight gradients; one subclass, in a file of its own, for each."""

    name: str
    """As plans and reports call it."""
    operation: Any
    """The masked operation that takes its place."""
    unit_name = "rows"
    """What rows of its weight are called where the graph does not say what they are."""
    rank = 2
    """Leading dimensions of its result that can be masked; 3 where whole matrices come before rows and columns."""
    is_split = False
    """Whether its node computes dX and more at once, so that dW is its output 1 and has to be taken out of it."""

    @property
    def operation_name(self) -> str:
        """`masked_mm`."""
        return str(self.operation).split(".")[1]

    def computes(self, node: fx.Node) -> bool:
        """Whether a node computes a product of this kind."""
        raise NotImplementedError

    def extents(self, node: fx.Node, result: fx.Node) -> Iterable[Any]:
        """Sizes whose product is its multiply-adds. node: computes it; result: its dW, another where it is split."""
        raise NotImplementedError

    def unfit(self, node: fx.Node, dim: int, inner: int) -> str | None:
        """Why rows along dimension `dim` of the result, `inner` entries each, cannot be left out."""
        return None

    def unit(self, node: fx.Node, rows: int) -> int:
        """Rows that cannot be parted, of so many."""
        return 1

    def no_kernel(self, node: fx.Node) -> str | None:
        """Why no kernel skips it by flags on a GPU alone: its operation would compute all of it there, then mask."""
        value = node.meta["val"][1] if self.is_split else node.meta["val"]
        return None if value.dtype in KERNEL_DTYPES else f"no kernel under CUDA graphs for {value.dtype}"

    def mask(self, node: fx.Node, extra: Extra, mark: Mark) -> None:
        """Put the masked operation in the node's place."""
        replace_node(node, self.operation, (*node.args, *extra, *mark.arguments()))


def replace_node(old: fx.Node, target: Any, args: tuple[Any, ...], *, contiguous: bool = False) -> None:
    """Put a call in a node's place. contiguous: what comes now is so, whatever was before."""
    with old.graph.inserting_after(old):
        new = old.graph.call_function(target, args)
    new.meta = dict(old.meta)
    if mark := old.meta.get(MARK):
        rename(new, f"dw_{mark.param}")  # what a reader of compiled code and traces finds
    if contiguous:
        new.meta["val"] = old.meta["val"].new_empty(old.meta["val"].shape)
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def call_before(node: fx.Node, target: Any, args: tuple[Any, ...], value: Any) -> fx.Node:
    """A new call in front of a node, in the same part of the graph."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, args)
    new.meta["val"] = value
    put_in_part_of(new, node)
    return new
