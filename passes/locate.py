"""Find, for every parameter of a joint graph, the products that compute its gradient. Only looks."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace

import torch
from torch import fx

from cacompile.torch_internals import opname

from .chains import chain
from .flops import Flops
from .nodes import exits, sizes
from .plan import Param, Plan, StaysDense, WeightGrad
from .products import SCATTERS, follows_dense, is_gathered, kind_and_flops, make_grad, no_kernel, result_of
from .rows import RESHAPES, SAME_SHAPE, Rows, Unfit
from .trace import DIMENSIONS, trace

aten = torch.ops.aten

DEVICES = ("cpu", "cuda", "meta")
"""Where masked operations exist; on meta a model is only looked at."""

_PASSED = {*SAME_SHAPE, *RESHAPES, aten.permute.default, aten.t.default, aten.expand.default, aten.slice.Tensor}
_PASSED |= {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.cat.default}
_PASSED |= {aten.slice_scatter.default, aten.select_scatter.default, aten._weight_norm_interface_backward.default}
"""What a gradient that stays dense is followed through for its FLOPs; not through sums: they end gradients of gains."""


def locate(plan: Plan, *, graphs: bool = False) -> Plan:
    """Fill `grads` with what can be masked and `dense` with what cannot, and why.

    graphs: the backward will be captured in a CUDA graph, so that no host can choose slices for the library.
    """
    found = {param.name: _locate(param) for param in plan.params}
    _locate_chains(plan.params, found)
    _remove_unmaskable(found, graphs)
    _count_dense(plan.params, found)
    grads = tuple(one for one in found.values() if isinstance(one, WeightGrad))
    dense = tuple(one for one in found.values() if isinstance(one, StaysDense))
    return replace(plan, grads=grads, dense=(*plan.dense, *dense))


def _locate(param: Param) -> WeightGrad | StaysDense:
    """A gradient that shares its products with nothing else."""
    if param.grad is None:
        return StaysDense(param.name, "other", "no gradient in this graph")
    if param.opaque:
        return StaysDense(param.name, "other", param.opaque)
    if 0 in param.shape:
        return StaysDense(param.name, "other", "empty")
    if len(param.shape) < 2:
        return StaysDense(param.name, "vector", "one-dimensional, a cheap reduction")
    found: list[WeightGrad] = []
    reasons = []
    for dim in range(min(len(param.shape), DIMENSIONS)):
        try:
            products = trace(param.grad, Rows(dim, 1, 0, param.shape[dim]))
        except Unfit as unfit:
            reasons.append(str(unfit))
            continue
        if not products:
            return StaysDense(param.name, "other", "its gradient is constant")
        found.append(make_grad(param, tuple(products), dim))
    if found:
        return replace(found[0], others=tuple(found[1:]))
    return StaysDense(param.name, "other", reasons[0])


_Found = dict[str, WeightGrad | StaysDense]


def _locate_chains(params: Iterable[Param], found: _Found) -> None:
    """Gradients that share their products with those of other parameters, from the largest on."""
    unshared = {
        param.grad: param
        for param in params
        if param.grad is not None and not param.opaque and 0 not in param.shape
        if isinstance(found[param.name], StaysDense)
    }
    if not unshared:
        return
    places = Counter(next(iter(unshared)).graph.output_node().args[0])
    owners = {grad: param for grad, param in unshared.items() if places[grad] == 1}
    for param in sorted(owners.values(), key=lambda param: -math.prod(param.shape)):
        left = found[param.name]
        if len(param.shape) > 1 and isinstance(left, StaysDense):
            made, reason = _chain(param, owners)
            if made:
                found.update({grad.param.name: grad for grad in made})
            elif reason:
                found[param.name] = replace(left, reason=reason)


def _chain(param: Param, owners: Mapping[fx.Node, Param]) -> tuple[tuple[WeightGrad, ...], str | None]:
    """The gradients of one chain along the first dimension that will do; or why none will, if there is a chain."""
    reasons = []
    for dim in range(min(len(param.shape), DIMENSIONS)):
        try:
            if made := chain(param, dim, owners):
                return made, None
        except Unfit as unfit:
            reasons.append(str(unfit))
    return (), next(iter(reasons), None)


def _remove_unmaskable(found: _Found, graphs: bool) -> None:
    """Leave dense what no masked operation would save work for, and what follows it."""
    home: torch.device | None = None
    grads = [grad for grad in found.values() if isinstance(grad, WeightGrad)]
    # what one product makes is skipped together or not at all
    unmeasured = {g.follows or g.param.name: reason for g in grads if (reason := _no_measure(g.param))}
    for name, grad in found.items():
        if isinstance(grad, WeightGrad) and grad.products:
            device = grad.param.placeholder.meta["val"].device
            if reason := unmeasured.get(name) or _no_operation(grad, device, home or device, graphs):
                found[name] = StaysDense(name, grad.kind, reason, grad.flops)
            else:
                home = home or device
    for name, grad in found.items():
        if isinstance(grad, WeightGrad) and isinstance(found.get(grad.follows), StaysDense):
            found[name] = StaysDense(name, grad.kind, follows_dense(grad))


def _no_measure(param: Param) -> str | None:
    """Why nobody could tell whether this parameter has converged, or what its skipped gradient would be."""
    dtype = param.placeholder.meta["val"].dtype
    if dtype.is_complex or (dtype.is_floating_point and dtype.itemsize < 2):
        return f"{str(dtype).removeprefix('torch.')}, of which no descent can be measured"
    return None


def _no_operation(grad: WeightGrad, device: torch.device, home: torch.device, graphs: bool) -> str | None:
    """Why no masked operation saves work here, for a gradient that could be masked."""
    if device.type not in DEVICES:
        return f"lives on {device}, where no masked operation exists"
    if device != home:
        return f"lives on {device}, the flags of this graph on {home}"
    return next(filter(None, map(no_kernel, grad.products)), None) if graphs and device.type == "cuda" else None


def _count_dense(params: Iterable[Param], found: _Found) -> None:
    """What kind of gradients stay dense, and their FLOPs: each product once, with the largest parameter it makes."""
    counted = {result_of(p.node) for one in found.values() if isinstance(one, WeightGrad) for p in one.products}
    ours = {param.grad for param in params}
    for param in sorted(params, key=lambda param: -math.prod(param.shape)):
        skip = found[param.name]
        if param.grad is not None and isinstance(skip, StaysDense) and skip.kind == "other":
            kind, products = _kind_of(param.grad, ours)
            flops = sum(flops for node, flops in products.items() if node not in counted)
            counted.update(products)
            found[param.name] = replace(skip, kind=kind, flops=flops)


def _kind_of(grad: fx.Node, ours: Container[fx.Node | None]) -> tuple[str, dict[fx.Node, int]]:
    """What kind of gradient this is, and the products it is made of, with their FLOPs; ours: gradients of parameters.

    A product that makes more than such gradients is no weight gradient: the input's, such as that of a position
    embedding.
    """
    kinds: list[str] = []
    products: dict[fx.Node, int] = {}
    seen, waiting = {grad}, [grad]
    while waiting:
        node = waiting.pop()
        if found := kind_and_flops(node):
            outputs = node.graph.output_node().args[0]
            if all(outputs[place] in ours for place in exits(node)):
                kinds.append(found[0])
                products[node] = found[1]
        elif is_gathered(node):
            kinds.append("gathered")
            products[node] = Flops.of(sizes(node.args[2]))
        elif opname(node) in SCATTERS:
            kinds.append("embedding")
        elif node.target in _PASSED or node.target is operator.getitem:
            new = [n for n in node.all_input_nodes if n not in seen]
            seen.update(new)
            waiting += reversed(new)
    return next(iter(kinds), "other"), products
