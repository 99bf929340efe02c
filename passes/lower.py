"""From the plan, which speaks of a graph's nodes, to the layout, which training holds long after the graph is gone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import SymInt, fx

from cacompile.layout import (
    FUNCTIONS,
    DerivedSize,
    GradLayout,
    MaskLayout,
    Monomial,
    Partition,
    SizeSource,
    StepLayout,
)
from cacompile.torch_internals import expression_of

from .flops import at_sizes, split
from .pieces import Pieces
from .plan import Plan, WeightGrad


def lower(plan: Plan) -> MaskLayout:
    """The layout of one planned graph. Holds nothing of the plan's nodes."""
    names, costs = list(plan.flops_by_param), plan.costs
    counts = [*plan.flops_by_param.values(), *(flops for grad in plan.grads for flops in grad.block_flops)]
    products = len(costs.backward)
    monomials, (step, forward, *coefficients) = split([costs.step, costs.forward, *costs.backward, *counts])
    backward, coefficients = coefficients[:products], coefficients[products:]
    left = iter(coefficients[len(names) :])
    pieces = Pieces(plan)
    return MaskLayout(
        params=tuple((param.name, param.index) for param in plan.params),
        grads=tuple(_grad(grad, [next(left) for _ in range(grad.blocks)], pieces) for grad in plan.grads),
        groups=tuple(replace(group, flops=int(group.flops)) for group in pieces.groups),
        families=plan.families,
        flops_by_param=tuple((name, int(flops)) for name, flops in plan.flops_by_param.items()),
        monomials=monomials,
        coefficients_by_param=tuple(zip(names, coefficients)),
        step=StepLayout(
            flops=int(costs.step),
            coefficients=step,
            forward=forward,
            backward=tuple(backward),
            compiled=(int(costs.forward), tuple(map(int, costs.backward))),
            needed=costs.needed,
        ),
        **_outcome(plan),
    )


def with_outcome(layout: MaskLayout, plan: Plan) -> MaskLayout:
    """The layout that knows what is really masked. plan: as masking has left it, with or without nodes."""
    return replace(layout, **_outcome(plan))


def _outcome(plan: Plan) -> dict[str, Any]:
    return {
        "dense": tuple(replace(dense, flops=int(dense.flops)) for dense in plan.dense),
        "masked": None if plan.masked is None else frozenset(plan.masked),
    }


def with_sources(layout: MaskLayout, backward: fx.Graph, handle: int) -> MaskLayout:
    """The layout that knows where this backward graph finds the sizes that FLOPs depend on, among its inputs.

    handle: position of the input that it will be called without. Where one of the sizes is nowhere to be found, FLOPs
    are those of the sizes seen when compiling; where only the whole step depends on it, the step's are in proportion.
    """
    if not any(monomial.atoms for monomial in layout.monomials):
        return layout
    inputs = backward.find_nodes(op="placeholder")
    known = _sizes_of([*inputs[:handle], *inputs[handle + 1 :]])
    sources = []
    for monomial in layout.monomials:
        atoms = (monomial.text,) if monomial.atoms and monomial.text in known else monomial.atoms
        found = [known.get(atom) or _derived(atom, known) for atom in atoms]
        sources.append(None if None in found else tuple(source for source in found if source is not None))
    if None in (source for source, coefficient in zip(sources, layout.coefficients) if coefficient):
        return replace(
            layout,
            monomials=(Monomial("1", ()),),
            grads=tuple(replace(grad, coefficients=(grad.block_flops,)) for grad in layout.grads),
            coefficients_by_param=tuple((name, (flops,)) for name, flops in layout.flops_by_param),
            step=layout.step.as_compiled(),
        )
    if None in sources:
        layout = replace(layout, step=layout.step.in_proportion(layout.coefficients, layout.flops))
    return replace(layout, sources=tuple(source or () for source in sources))


def _sizes_of(inputs: Sequence[fx.Node]) -> dict[str, SizeSource | DerivedSize]:
    """Every expression in symbolic sizes that an input of the backward has as a size, and what is a step from it."""
    known: dict[str, SizeSource | DerivedSize] = {}
    steps = []
    for position, node in enumerate(inputs):
        value = node.meta.get("val")
        found = [(None, value)] if isinstance(value, SymInt) else enumerate(getattr(value, "shape", ()))
        for dim, size in found:
            if isinstance(size, SymInt) and (text := str(expression_of(size))) not in known:
                source = known[text] = SizeSource(position, dim)
                steps.append((expression_of(size), source))
    for expression, source in steps:  # 2 * s0 + 1 has s0
        plus, product = expression.as_coeff_Add()
        times, factor = product.as_coeff_Mul()
        if plus.is_Integer and times.is_Integer:
            known.setdefault(str(factor), DerivedSize(f"(size - {plus}) // {times}", (("size", source),)))
    return known


def _derived(atom: str, known: Mapping[str, SizeSource | DerivedSize]) -> DerivedSize | None:
    """A size by its formula, where all that is in it is known."""
    names = set(re.findall(r"[A-Za-z_]\w*", atom)) - FUNCTIONS.keys()
    if not names <= known.keys() or "/" in atom.replace("//", ""):
        return None
    return DerivedSize(atom, tuple((name, known[name]) for name in sorted(names)))


def at_mean_sizes(plan: Plan, sizes: Mapping[Monomial, float]) -> Plan:
    """The plan with FLOPs of other sizes than when compiling. sizes: of the layout's monomials."""

    def count(flops: int) -> int:
        return at_sizes(flops, sizes)

    def counted(grad: WeightGrad) -> WeightGrad:
        return replace(grad, products=tuple(replace(p, flops=count(p.flops)) for p in grad.products))

    costs = plan.costs
    return replace(
        plan,
        costs=replace(
            costs,
            step=count(costs.step),
            forward=count(costs.forward),
            backward=tuple(map(count, costs.backward)),
        ),
        grads=tuple(map(counted, plan.grads)),
        dense=tuple(replace(dense, flops=count(dense.flops)) for dense in plan.dense),
        groups=tuple(replace(group, flops=count(group.flops)) for group in plan.groups),
    )


def _grad(grad: WeightGrad, coefficients: list[tuple[int, ...]], pieces: Pieces) -> GradLayout:
    cut = grad.param.cut_along(grad.dim)
    times = 1 if cut is None else cut.pieces
    return GradLayout(
        param=grad.param.name,
        index=grad.param.index,
        partition=Partition(grad.dim, grad.block, grad.param.shape[grad.dim] * times),
        first_flag=grad.first_flag,
        groups=pieces.groups_of(grad),
        block_flops=tuple(map(int, grad.block_flops)) * times,
        coefficients=tuple(zip(*coefficients * times)),
        follows=grad.follows,
        window=None if cut is None else (cut.index * grad.blocks, (cut.index + 1) * grad.blocks),
    )
