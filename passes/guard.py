"""Swap weight-gradient products for their masked twins. The only pass that edits, and only the planned nodes."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from cacompile.kernels import masked_bmm, masked_conv_dw, masked_mm
from cacompile.plan import Plan, Product, Skip, WeightGrad

from .products import exits, uses

aten = torch.ops.aten

MARK = "convaware"
"""Key in `node.meta` under which a planned product carries its Mark from the joint graph into the backward."""

FLAGS = "convaware_flags"
"""Name of the extra graph input: one uint8 for each block of the graph, 0 = skip."""

HOST_FLAGS = "convaware_host_flags"
"""Name of a second extra input, where asked for: the same flags in CPU memory."""

Extra = tuple[fx.Node, fx.Node | None]
"""The flags, and the flags in CPU memory or None: arguments of every masked operation."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What a product needs to know to become its masked twin."""

    param: str
    slots: tuple[int, ...]
    """For each dimension of the product's result, its first block among the flags."""
    blocks: tuple[int, ...]
    """For each dimension, entries a block; 0 where it is not masked."""

    @classmethod
    def of(cls, grad: WeightGrad, product: Product) -> Mark:
        slot, block = grad.slot + product.lo // grad.block, grad.block * product.inner
        here = [dim == product.dim for dim in range(3 if product.kind == "batched" else 2)]
        return cls(grad.param.name, tuple(slot * on for on in here), tuple(block * on for on in here))

    @property
    def only(self) -> tuple[int, int, int]:
        """(slot, block, dimension) of the one dimension that is masked."""
        [dim] = (dim for dim, block in enumerate(self.blocks) if block)
        return self.slots[dim], self.blocks[dim], dim

    def arguments(self) -> tuple[list[int], list[int]]:
        """slots and blocks, as an operation takes them."""
        return list(self.slots), list(self.blocks)


def mark_products(plan: Plan) -> None:
    """Write each planned product's Mark on its node: the partitioner copies `meta` into the backward graph."""
    for grad in plan.grads:
        for product in grad.products:
            product.node.meta[MARK] = Mark.of(grad, product)


def guard_weight_grads(gm: fx.GraphModule, plan: Plan, host: bool = False) -> Plan:
    """Swap each marked product of a backward graph for its masked twin.

    Before:  dw = mm(dy_t, x)
    After:   dw = masked_mm(dy_t, x, flags, host, [slot, 0], [block, 0])   # zeros where flags[slot + row // block] == 0

    The flags are one more input. host: they are two, the second being the flags in CPU memory; otherwise that argument
    is None, as it must be in a graph that is captured (CUDA graphs) or on CPUs, where the flags are in CPU memory.

    A convolution's backward is split: the data gradient stays with it, the weight gradient leaves, the bias gradient
    becomes a sum, because CPU libraries compute the whole weight gradient whenever they are asked for that of the bias.
    A parameter whose products did not all reach this graph unchanged stays dense, with the reason in `skips`.
    """
    marked: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if mark := node.meta.get(MARK):
            marked.setdefault(mark.param, []).append(node)
    guarded, skips = [], []
    extra: Extra | None = None
    for grad in plan.grads:
        nodes = marked.get(grad.param.name, [])
        if reason := _why_not(grad, nodes):
            skips.append(Skip(grad.param.name, grad.kind, reason, grad.flops))
            continue
        extra = extra or (_input(gm.graph, FLAGS), _input(gm.graph, HOST_FLAGS) if host else None)
        for node in nodes:
            _MASK[node.target](node, extra, node.meta[MARK])
        guarded.append(grad.param.name)
    if guarded:
        gm.graph.lint()
        gm.recompile()
    return replace(plan, guarded=tuple(guarded), skips=(*plan.skips, *skips))


def _why_not(grad: WeightGrad, nodes: list[fx.Node]) -> str | None:
    if len(nodes) != len(grad.products):
        return f"{len(nodes)} of its {len(grad.products)} products reached the backward graph as they were planned"
    for node in nodes:
        if node.target not in _MASK:
            return f"the compiler's own passes turned its product into {node.target}"
        result = node if node.target is not aten.convolution_backward.default else _output(node, 1)
        if result is None or uses(result) != 1 or exits(result) != 1:
            return "its product makes more than this gradient in the backward graph"
    return None


def _input(graph: fx.Graph, name: str) -> fx.Node:
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        return graph.placeholder(name)


def _replace(old: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
    with old.graph.inserting_after(old):
        new = old.graph.call_function(target, args)
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def _mask_mm(node: fx.Node, extra: Extra, mark: Mark) -> None:
    _replace(node, masked_mm, (*node.args, *extra, *mark.arguments()))


def _mask_bmm(node: fx.Node, extra: Extra, mark: Mark) -> None:
    _replace(node, masked_bmm, (*node.args, *extra, *mark.arguments()))


def _output(conv: fx.Node, index: int) -> fx.Node | None:
    return next((user for user in conv.users if user.target is operator.getitem and user.args[1] == index), None)


def _mask_convolution(conv: fx.Node, extra: Extra, mark: Mark) -> None:
    grad_out, x, weight, bias_sizes, *settings, (needs_dx, _, _) = conv.args
    dw, db = _output(conv, 1), _output(conv, 2)
    assert dw is not None
    dw.meta[MARK] = mark
    _replace(dw, masked_conv_dw, (grad_out, x, weight, *extra, *mark.only, *settings))
    if db is not None:
        _replace(db, aten.sum.dim_IntList, (grad_out, sites(grad_out)))
    if needs_dx:
        conv.args = (grad_out, x, weight, bias_sizes, *settings, [True, False, False])
        conv.meta = {key: value for key, value in conv.meta.items() if key != MARK}
        conv.meta["val"] = (conv.meta["val"][0], None, None)
    else:
        conv.graph.erase_node(conv)


def sites(grad_out: Any) -> list[int]:
    """The dimensions of an image batch over which a bias gradient is summed: all but the channels."""
    return [dim for dim in range(grad_out.meta["val"].dim()) if dim != 1]


_MASK = {
    aten.mm.default: _mask_mm,
    aten.bmm.default: _mask_bmm,
    aten.convolution_backward.default: _mask_convolution,
}
