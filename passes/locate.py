"""Find, for every parameter of a joint graph, the products that compute its gradient. Only looks.

    dw_t = mm(x_t, dy)          weight `w` of shape [N, K]: rows of `w` are columns of the product,
    dw   = permute(dw_t)        so Product(dw_t, dim=1)

The walk goes from the gradient output back to the products and carries along where the parameter's rows lie.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from cacompile.plan import Param, Plan, Product, Skip, WeightGrad

from .products import kind_and_flops, no_kernel, sizes, uses

aten = torch.ops.aten
prims = torch.ops.prims

_SAME_SHAPE = {prims.convert_element_type.default, aten._to_copy.default}
_SAME_SHAPE |= {aten.clone.default, aten.alias.default, aten.neg.default}
_RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.squeeze.default}
_RESHAPES |= {aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default}
_CONSTANTS = {aten.full.default, aten.full_like.default}
_CONSTANTS |= {aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default}
_SCATTERS = {"index_put", "_unsafe_index_put", "_unsafe_masked_index_put_accumulate", "embedding_dense_backward"}
_SCATTERS |= {"_embedding_bag_backward", "_embedding_bag_dense_backward"}
_REASONS = dict.fromkeys(_SCATTERS, "an embedding: its gradient is a scatter into the rows that were looked up")
_REASONS["expand"] = "its gradient is broadcast from a smaller one"
_REASONS["slice"] = "its gradient is cut out of a product that makes other gradients as well"

DEVICES = ("cpu", "cuda", "meta")
"""Where masked operations exist; on meta a model is only looked at."""


class _Unfit(Exception):
    """This gradient cannot be masked; the text says why."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows `lo:hi` of the parameter lie along `dim` of a node, `inner` neighbouring entries a row."""

    dim: int
    inner: int
    lo: int
    hi: int


def locate(plan: Plan, *, graphs: bool = False) -> Plan:
    """Fill `grads` with what can be masked and `skips` with what cannot, and why.

    graphs: the backward will be captured in a CUDA graph, so that no host can choose slices for the library.
    """
    grads: list[WeightGrad] = []
    skips: list[Skip] = []
    for param in plan.params:
        found = _locate(param)
        if isinstance(found, WeightGrad) and (reason := _no_operation(found, grads, graphs)):
            found = Skip(param.name, found.kind, reason, found.flops)
        (grads if isinstance(found, WeightGrad) else skips).append(found)  # type: ignore[arg-type]
    return replace(plan, grads=tuple(grads), skips=(*plan.skips, *skips))


def _no_operation(grad: WeightGrad, others: list[WeightGrad], graphs: bool) -> str | None:
    """Why no masked operation saves work here, for a gradient that could be masked."""
    device = grad.param.placeholder.meta["val"].device
    if device.type not in DEVICES:
        return f"lives on {device}, where no masked operation exists"
    if others and device != (home := others[0].param.placeholder.meta["val"].device):
        return f"lives on {device}, the flags of this graph on {home}"
    return next(filter(None, map(no_kernel, grad.products)), None) if graphs and device.type == "cuda" else None


def _locate(param: Param) -> WeightGrad | Skip:
    if param.grad is None:
        return Skip(param.name, "other", "no gradient in this graph")
    if len(param.shape) < 2:
        return Skip(param.name, "vector", "one-dimensional, a cheap reduction")
    reasons = []
    for dim in (0, 1):  # rows first; a transposed convolution has its filters along dimension 1
        try:
            products = _trace(param.grad, _Rows(dim, 1, 0, param.shape[dim]))
        except _Unfit as unfit:
            reasons.append(str(unfit))
            continue
        if not products:
            return Skip(param.name, "other", "its gradient is constant")
        unit = max(_unit(p) for p in products)
        kind = max((p.kind for p in products), key=[p.kind for p in products].count)
        return WeightGrad(param, tuple(products), kind, dim, unit)
    kind, flops = _kind_of(param.grad)
    return Skip(param.name, kind, reasons[0], flops)


def _trace(node: Any, rows: _Rows) -> list[Product]:
    """Products under `node` that make these rows; raises _Unfit where the way back is not understood."""
    if not isinstance(node, fx.Node):
        return []
    if node.op != "call_function":
        raise _Unfit(f"gradient comes from the graph's input {node.name}")
    if node.target in _CONSTANTS:
        return []
    if (count := uses(node)) != 1:
        raise _Unfit(f"{node.target} is used {count} times, so masking it would change something else")
    if node.target in _SAME_SHAPE:
        return _trace(node.args[0], rows)
    if node.target in _RESHAPES:
        return _trace(node.args[0], _through_reshape(node, rows))
    if step := _STEPS.get(node.target):
        return step(node, rows)
    if reason := _REASONS.get(getattr(node.target, "_opname", "")):
        raise _Unfit(reason)
    raise _Unfit(f"gradient comes from {node.target}, only matmuls and convolutions are guarded")


def _through_reshape(node: fx.Node, rows: _Rows) -> _Rows:
    """The same rows in the tensor before the reshape; a row may become several neighbouring entries or fewer."""
    before, after = _shape(node.args[0]), _shape(node)
    outer = math.prod(after[: rows.dim])
    for dim, size in enumerate(before):
        if math.prod(before[:dim]) != outer or (size == 1 and after[rows.dim] != 1):
            continue
        inner = rows.inner
        if size % after[rows.dim] == 0:  # further dimensions were merged into this one
            inner *= size // after[rows.dim]
        elif after[rows.dim] % size == 0 and inner % (after[rows.dim] // size) == 0:  # a row's entries were split off
            inner //= after[rows.dim] // size
        else:
            break
        return replace(rows, dim=dim, inner=inner)
    raise _Unfit(f"rows cannot be followed through a reshape {list(before)} -> {list(after)}")


def _permute(node: fx.Node, rows: _Rows) -> list[Product]:
    order = [d % len(node.args[1]) for d in node.args[1]]
    return _trace(node.args[0], replace(rows, dim=order[rows.dim]))


def _sum(node: fx.Node, rows: _Rows) -> list[Product]:
    ndim = len(_shape(node.args[0]))
    summed = {d % ndim for d in node.args[1]}
    keepdim = len(node.args) > 2 and bool(node.args[2])
    kept = list(range(ndim)) if keepdim else [d for d in range(ndim) if d not in summed]
    if kept[rows.dim] in summed:
        raise _Unfit("gradient is summed over the rows themselves")
    return _trace(node.args[0], replace(rows, dim=kept[rows.dim]))


def _add(node: fx.Node, rows: _Rows) -> list[Product]:
    """A sum is masked where its addends can be; an addend that cannot (a tied embedding's scatter) is computed.

    What it gives to a skipped row does not last: the estimate, which is one of the whole gradient, replaces it.
    """
    found: list[Product] = []
    reasons = []
    for addend in node.args[:2]:
        try:
            if isinstance(addend, fx.Node) and _shape(addend) != _shape(node):
                raise _Unfit("gradient is broadcast into a sum")
            found += _trace(addend, rows)
        except _Unfit as unfit:
            reasons.append(str(unfit))
    if reasons and not found:
        raise _Unfit(reasons[0])
    return found


def _mul(node: fx.Node, rows: _Rows) -> list[Product]:
    reasons = []
    for factor in node.args[:2]:
        if isinstance(factor, fx.Node) and _shape(factor) == _shape(node):
            try:
                if found := _trace(factor, rows):
                    return found
            except _Unfit as unfit:
                reasons.append(str(unfit))
    raise _Unfit(reasons[0] if reasons else f"{node.target} of broadcast operands")


def _cat(node: fx.Node, rows: _Rows) -> list[Product]:
    """Parts laid one behind the other: rows of the parameter if joined along them, columns otherwise."""
    parts = node.args[0]
    along = (node.args[1] if len(node.args) > 1 else 0) % len(_shape(node))
    found: list[Product] = []
    start = rows.lo
    for part in parts:
        if along != rows.dim:
            found += _trace(part, rows)
            continue
        size = _shape(part)[along]
        if size % rows.inner:
            raise _Unfit("parts are joined inside a row")
        found += _trace(part, replace(rows, lo=start, hi=start + size // rows.inner))
        start += size // rows.inner
    return found


def _slice_scatter(node: fx.Node, rows: _Rows) -> list[Product]:
    base, part = node.args[:2]
    rest: list[Any] = [*node.args[2:], *(0, None, None, 1)[len(node.args) - 2 :]]
    dim, start, stop, step = rest
    if step != 1:
        raise _Unfit(f"gradient of a slice with step {step}")
    dim %= len(_shape(node))
    size = _shape(node)[dim]
    start, stop, _ = slice(start, stop).indices(size)
    inside = rows
    if dim == rows.dim:
        if start % rows.inner or stop % rows.inner:
            raise _Unfit("a slice cuts through a row")
        inside = replace(rows, lo=rows.lo + start // rows.inner, hi=rows.lo + stop // rows.inner)
    return _trace(base, rows) + _trace(part, inside)


def _select_scatter(node: fx.Node, rows: _Rows) -> list[Product]:
    base, part, dim, index = node.args
    dim %= len(_shape(node))
    if dim != rows.dim:
        inside = replace(rows, dim=rows.dim - (dim < rows.dim))
    elif rows.inner == 1:  # one row is the whole part: all of its first dimension
        row = rows.lo + index % _shape(node)[dim]
        inside = _Rows(0, _shape(part)[0], row, row + 1)
    else:
        raise _Unfit("a selection cuts through a row")
    return _trace(base, rows) + _trace(part, inside)


def _matmul(node: fx.Node, rows: _Rows) -> list[Product]:
    return [_product(node, node, rows)]


def _convolution(node: fx.Node, rows: _Rows) -> list[Product]:
    conv, index = node.args
    if not (isinstance(conv, fx.Node) and conv.target is aten.convolution_backward.default and index == 1):
        raise _Unfit(f"gradient is output {index} of {getattr(conv, 'target', conv)}")
    *_, transposed, _output_padding, groups, _mask = conv.args
    if transposed and groups != 1:
        raise _Unfit(f"transposed convolution with {groups} groups")
    if rows.dim != int(transposed) or rows.inner != 1:
        raise _Unfit("filters lie along another dimension of the convolution's weight")
    return [_product(node, conv, rows)]


_STEPS: dict[Any, Callable[[fx.Node, _Rows], list[Product]]] = {
    aten.permute.default: _permute,
    aten.t.default: lambda node, rows: _trace(node.args[0], replace(rows, dim=1 - rows.dim)),
    aten.sum.dim_IntList: _sum,
    aten.add.Tensor: _add,
    aten.mul.Tensor: _mul,
    aten.mul.Scalar: lambda node, rows: _trace(node.args[0], rows),
    aten.cat.default: _cat,
    aten.slice_scatter.default: _slice_scatter,
    aten.select_scatter.default: _select_scatter,
    aten.mm.default: _matmul,
    aten.bmm.default: _matmul,
    operator.getitem: _convolution,
}


def _product(result: fx.Node, node: fx.Node, rows: _Rows) -> Product:
    if _shape(result)[rows.dim] != (rows.hi - rows.lo) * rows.inner:
        raise _Unfit(f"rows {rows.lo}:{rows.hi} do not fill dimension {rows.dim} of {node.target}")
    found = kind_and_flops(result)
    assert found is not None
    kind, flops = found
    return Product(node, kind, rows.dim, rows.inner, rows.lo, rows.hi, flops)


def _unit(product: Product) -> int:
    if product.kind != "convolution":
        return 1
    groups = product.node.args[9]
    return product.hi // groups if groups != 1 else 1


def _kind_of(grad: fx.Node) -> tuple[str, int]:
    """What kind of gradient this is, and its FLOPs, for one that stays dense."""
    node: Any = grad
    while isinstance(node, fx.Node) and node.op == "call_function":
        if getattr(node.target, "_opname", "") in _SCATTERS:
            return "embedding", 0
        if found := kind_and_flops(node):
            return found
        node = next((a for a in node.args if isinstance(a, fx.Node)), None)
    return "other", 0


def _shape(node: Any) -> tuple[int, ...]:
    found = sizes(node)
    if not all(isinstance(size, int) for size in found):
        raise _Unfit("gradient passes through a shape that is not known when compiling")
    return found
