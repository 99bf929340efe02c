"""The passes that only look, in the order they run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

from torch import fx

from .coupling.couple import couple
from .group import group
from .inside import count_inside
from .locate import locate
from .plan import Param, Plan, StepCosts
from .step import step_costs


def make_plan(
    params: tuple[Param, ...],
    *,
    block_rows: int,
    graphs: bool = False,
    frozen: Mapping[fx.Node, str] | None = None,
) -> Plan:
    """What can be skipped in one joint graph: locate -> count_inside -> couple -> group. Changes nothing.

    graphs: see `locate`; frozen: the placeholders of parameters that are not trained, and their names.
    """
    start = time.perf_counter()
    plan = count_inside(locate(Plan(params=params), graphs=graphs))
    if plan.grads:
        graph = plan.grads[0].param.placeholder.graph
        coupling = couple(
            graph, {param.placeholder: param.name for param in params if not param.opaque} | dict(frozen or {})
        )
        plan = group(plan, coupling, block_rows=block_rows)
    costs = step_costs(params[0].placeholder.graph) if params else StepCosts()
    return replace(plan, costs=costs, analysis_s=time.perf_counter() - start)
