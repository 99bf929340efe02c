"""Cut each maskable gradient into groups of rows that are kept or skipped together. Only looks."""

from __future__ import annotations

import math
from dataclasses import replace

from cacompile.plan import ParamGroup, Plan, Skip, Slice, WeightGrad

SMALLEST_BLOCK = 16
"""Rows below which a block costs more to handle than it saves."""


def group(plan: Plan, *, block_rows: int) -> Plan:
    """Blocks of `block_rows` rows of each weight, each expert by itself; the last block of a weight may be smaller."""
    grads: list[WeightGrad] = []
    groups: list[ParamGroup] = []
    skips: list[Skip] = []
    for grad in plan.grads:
        block = _block(grad, block_rows)
        if block is None:
            edges = ", ".join(map(str, _edges(grad)))
            reason = f"its parts meet at rows {edges}, where no blocks of {SMALLEST_BLOCK} rows or more end"
            skips.append(Skip(grad.param.name, grad.kind, reason, grad.flops))
            continue
        grads.append(replace(grad, block=block, slot=len(groups)))
        groups += _groups(grads[-1])
    return replace(plan, grads=tuple(grads), groups=tuple(groups), skips=(*plan.skips, *skips))


def _edges(grad: WeightGrad) -> list[int]:
    """Rows at which one product ends and another begins."""
    rows = grad.param.shape[grad.dim]
    return sorted({edge for p in grad.products for edge in (p.lo, p.hi)} - {0, rows})


def _block(grad: WeightGrad, block_rows: int) -> int | None:
    """Rows a block: whole units, ending where products end, about `block_rows` rows of the product."""
    if any(p.kind == "batched" and p.dim == 0 for p in grad.products):
        return 1
    target = max(1, block_rows // max(p.inner for p in grad.products))
    common = math.gcd(*_edges(grad))
    if common == 0:  # one product makes all rows, or each makes all of them
        return max(1, target // grad.unit) * grad.unit
    fitting = [size for size in range(grad.unit, max(target, grad.unit) + 1, grad.unit) if common % size == 0]
    return fitting[-1] if fitting and fitting[-1] >= min(target, SMALLEST_BLOCK) else None


def _groups(grad: WeightGrad) -> list[ParamGroup]:
    rows, name = grad.param.shape[grad.dim], grad.param.name
    per_row = [sum(p.flops // (p.hi - p.lo) for p in grad.products if p.lo <= start < p.hi)
               for start in range(0, rows, grad.block)]  # fmt: skip
    groups = []
    for start, flops in zip(range(0, rows, grad.block), per_row, strict=True):
        stop = min(start + grad.block, rows)
        rows_of = Slice(name, grad.dim, start, stop)
        groups.append(ParamGroup(f"{name}[{start}:{stop}]", (rows_of,), family=name, flops=flops * (stop - start)))
    return groups
