"""Swap weight-gradient products for their masked twins. The only pass that edits, and only the planned nodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._functorch._aot_autograd.descriptors import GradAOTOutput, PlainAOTInput

from cacompile.kernels import masked_bmm, masked_conv_dw, masked_grouped_mm, masked_mm
from cacompile.plan import Plan, Product, Skip, WeightGrad

from .products import exits, follows_dense, is_experts, is_transposed, output_of, reached, result_of, uses

aten = torch.ops.aten

MARK = "convaware"
"""Key in `node.meta` under which a planned product carries its Mark from the joint graph into the backward."""

FLAGS = "convaware_flags"
"""Name of the extra graph input: one uint8 for each block of the graph, 0 = skip."""

HOST_FLAGS = "convaware_host_flags"
"""Name of a second extra input, where asked for: the same flags in CPU memory."""

PARTITION = "partitioner_tag"
"""Key in `node.meta` under which a joint graph says whether a node is of the backward."""

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
    shared: tuple[int, ...] = ()
    """Where it flows into gradients by several ways: of which parameters, by position among Dynamo's inputs."""

    @classmethod
    def of(cls, grad: WeightGrad, product: Product, shared: tuple[int, ...] = ()) -> Mark:
        slot, block = grad.slot + product.lo // grad.block, grad.block * product.inner
        here = [dim == product.dim for dim in range(3 if product.kind in ("batched", "grouped") else 2)]
        return cls(grad.param.name, tuple(slot * on for on in here), tuple(block * on for on in here), shared)

    @property
    def only(self) -> tuple[int, int, int]:
        """(slot, block, dimension) of the one dimension that is masked."""
        [dim] = (dim for dim, block in enumerate(self.blocks) if block)
        return self.slots[dim], self.blocks[dim], dim

    @property
    def transposed(self) -> Mark:
        """For the transposed product of each expert."""
        (experts, rows, columns), (e, m, n) = self.slots, self.blocks
        return replace(self, slots=(experts, columns, rows), blocks=(e, n, m))

    def arguments(self) -> tuple[list[int], list[int]]:
        """slots and blocks, as an operation takes them."""
        return list(self.slots), list(self.blocks)


def mark_products(plan: Plan) -> None:
    """Write each planned product's Mark on its node: the partitioner copies `meta` into the backward graph."""
    for grad in plan.grads:
        members = [grad, *(other for other in plan.grads if other.follows == grad.param.name)]
        shared = tuple(member.param.index for member in members)
        for product in grad.products:
            result = result_of(product.node)
            straight = result is None or all(uses(node) == 1 for node in reached(result))
            product.node.meta[MARK] = Mark.of(grad, product, () if straight else shared)


def guard_weight_grads(gm: fx.GraphModule, plan: Plan, host: bool = False, flags: fx.Node | None = None) -> Plan:
    """Swap each marked product of a backward or joint graph for its masked twin.

    Before:  dw = mm(dy_t, x)
    After:   dw = masked_mm(dy_t, x, flags, host, [slot, 0], [block, 0])   # zeros where flags[slot + row // block] == 0

    The flags are one more input, unless the graph has them already, as `flags`. host: they are two, the second being
    the flags in CPU memory; otherwise that argument is None, as it must be in a graph that is captured (CUDA graphs) or
    on CPUs, where the flags are in CPU memory.

    A convolution's backward is split: the data gradient stays with it, the weight gradient leaves, the bias gradient
    becomes a sum, because CPU libraries compute the whole weight gradient whenever they are asked for that of the bias.
    So is the backward of transformers' experts, of which two outputs are asked: dX becomes their forward operation.
    A parameter whose products did not all reach this graph unchanged stays dense, with the reason in `skips`, and so do
    those that follow it.
    """
    marked: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if mark := node.meta.get(MARK):
            marked.setdefault(mark.param, []).append(node)
    reasons = {g.param.name: _why_not(g, marked.get(g.param.name, [])) for g in plan.grads if not g.follows}
    extra: Extra | None = (flags, None) if flags is not None else None
    for name in [name for name, reason in reasons.items() if reason is None]:
        extra = extra or (_input(gm.graph, FLAGS), _input(gm.graph, HOST_FLAGS) if host else None)
        for node in marked[name]:
            twin = _twin(node)
            assert twin is not None
            twin(node, extra, node.meta[MARK])
    for grad in plan.grads:
        if grad.follows:
            dense = reasons.get(grad.follows, "") is not None
            reasons[grad.param.name] = follows_dense(grad) if dense else None
    if extra:
        gm.graph.lint()
        gm.recompile()
    guarded = tuple(g.param.name for g in plan.grads if reasons[g.param.name] is None)
    skips = [Skip(g.param.name, g.kind, reason, g.flops) for g in plan.grads if (reason := reasons[g.param.name])]
    return replace(plan, guarded=guarded, skips=(*plan.skips, *skips))


def _why_not(grad: WeightGrad, nodes: list[fx.Node]) -> str | None:
    if len(nodes) != len(grad.products):
        return f"{len(nodes)} of its {len(grad.products)} products reached the backward graph as they were planned"
    shared: list[fx.Node] = []
    params: tuple[int, ...] = ()
    for node in nodes:
        if _twin(node) is None:
            return f"the compiler's own passes turned its product into {node.target}"
        result, mark = result_of(node), node.meta[MARK]
        if result is not None and mark.shared:
            shared, params = [*shared, result], mark.shared
        elif result is None or uses(result) != 1 or len(exits(result)) != 1:
            return "its product makes more than this gradient in the backward graph"
    if shared and not _make_just(shared, params):
        return "its product makes other things in the backward graph than the gradients that were planned"
    return None


def _make_just(results: list[fx.Node], params: tuple[int, ...]) -> bool:
    """Whether these nodes are made into the gradients of these parameters, all of them, and nothing else."""
    places = {place for result in results for place in exits(result)}
    descs = results[0].graph.output_node().meta.get("desc")
    if descs is None or len(places) != len(params):
        return len(places) == len(params)
    made = [desc.grad_of for place in places if isinstance(desc := descs[place], GradAOTOutput)]
    # an exported joint graph has names in place of positions, and its inputs in their order
    inputs = {node.meta.get("desc"): i for i, node in enumerate(results[0].graph.find_nodes(op="placeholder"))}
    return sorted(d.idx if isinstance(d, PlainAOTInput) else inputs.get(d, -1) for d in made) == sorted(params)


def _input(graph: fx.Graph, name: str) -> fx.Node:
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        return graph.placeholder(name)


def _before(node: fx.Node, target: Any, args: tuple[Any, ...], value: Any) -> fx.Node:
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, args)
    new.meta["val"] = value
    if tag := node.meta.get(PARTITION):
        new.meta[PARTITION] = tag
    return new


def _permuted(node: fx.Node, matrix: Any, order: list[int]) -> fx.Node:
    """A view, in front of `node`."""
    return _before(node, aten.permute.default, (matrix, order), matrix.meta["val"].permute(order))


def _replace(old: fx.Node, target: Any, args: tuple[Any, ...], *, contiguous: bool = False) -> None:
    """contiguous: what comes now is so, whatever was before."""
    with old.graph.inserting_after(old):
        new = old.graph.call_function(target, args)
    new.meta = dict(old.meta)
    if mark := old.meta.get(MARK):
        new._rename(f"dw_{mark.param}")  # what a reader of compiled code and traces finds
    if contiguous:
        new.meta["val"] = old.meta["val"].new_empty(old.meta["val"].shape)
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def _mask_mm(node: fx.Node, extra: Extra, mark: Mark) -> None:
    _replace(node, masked_mm, (*node.args, *extra, *mark.arguments()))


def _mask_bmm(node: fx.Node, extra: Extra, mark: Mark) -> None:
    _replace(node, masked_bmm, (*node.args, *extra, *mark.arguments()))


def _mask_grouped(node: fx.Node, extra: Extra, mark: Mark) -> None:
    _replace(node, masked_grouped_mm, (*node.args, *extra, *mark.arguments()), contiguous=True)


def _mask_experts(node: fx.Node, extra: Extra, mark: Mark) -> None:
    """dX is the forward with each expert's weights transposed; dW is computed as it lies in memory."""
    x, weight, offs, grad_out = node.args
    dx, dw = output_of(node, 0), output_of(node, 1)
    assert dw is not None
    if dx is not None:
        turned = _permuted(dx, weight, [0, 2, 1])
        _replace(dx, experts_forward(), (grad_out, turned, offs), contiguous=True)
    if is_transposed(node):
        call = (_permuted(dw, grad_out, [1, 0]), x, offs, *extra, *mark.transposed.arguments())
        product = _before(dw, masked_grouped_mm, call, dw.meta["val"].permute([0, 2, 1]))
        _replace(dw, aten.permute.default, (product, [0, 2, 1]))
    else:
        call = (_permuted(dw, x, [1, 0]), grad_out, offs, *extra, *mark.arguments())
        _replace(dw, masked_grouped_mm, call, contiguous=True)
    node.graph.erase_node(node)


def experts_forward() -> Any:
    """Only looked up beside its backward, so that transformers has been imported."""
    return torch.ops.transformers.grouped_mm_fallback.default


def _mask_convolution(conv: fx.Node, extra: Extra, mark: Mark) -> None:
    grad_out, x, weight, bias_sizes, *settings, (needs_dx, _, _) = conv.args
    dw, db = output_of(conv, 1), output_of(conv, 2)
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


_TWINS = {
    aten.mm.default: _mask_mm,
    aten.bmm.default: _mask_bmm,
    aten._grouped_mm.default: _mask_grouped,
    aten.convolution_backward.default: _mask_convolution,
}


def _twin(node: fx.Node) -> Callable[[fx.Node, Extra, Mark], None] | None:
    """What swaps a product for its masked twin."""
    return _mask_experts if is_experts(node) else _TWINS.get(node.target)
