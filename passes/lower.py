"""From the plan, which speaks of a graph's nodes, to the layout, which training holds long after the graph is gone."""

from __future__ import annotations

from cacompile.layout import GradLayout, MaskLayout, Partition

from .plan import Plan, WeightGrad


def lower(plan: Plan) -> MaskLayout:
    """The layout of one planned graph. Holds nothing of the plan's nodes."""
    return MaskLayout(
        params=tuple((param.name, param.index) for param in plan.params),
        grads=tuple(map(_grad, plan.grads)),
        groups=plan.groups,
        families=plan.families,
        dense=plan.dense,
        flops_by_param=tuple(plan.flops_by_param.items()),
        masked=None if plan.masked is None else frozenset(plan.masked),
    )


def _grad(grad: WeightGrad) -> GradLayout:
    return GradLayout(
        param=grad.param.name,
        index=grad.param.index,
        partition=Partition(grad.dim, grad.block, grad.param.shape[grad.dim]),
        first_flag=grad.first_flag,
        groups=grad.groups,
        block_flops=grad.block_flops,
        follows=grad.follows,
    )
