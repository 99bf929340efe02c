"""How a graph parts its parameters into blocks, and which of them it makes one group."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cacompile.config import Config
from cacompile.layout import GradLayout, MaskLayout
from cacompile.torch_internals import warning_once

from .groups import GroupMembers, Member, tie
from .params import ParamState
from .registry import registry
from .shards import has_share
from .table import BlockTable

log = logging.getLogger(__name__)


PARTED = "is parted into other groups by another graph"
SPREAD = "is a DTensor that fully_shard or DistributedDataParallel spreads as well"
"""Why a parameter that a graph could mask stays dense where it runs with it."""


def part(grad: GradLayout, param: Any, config: Config) -> ParamState | None:
    """The parameter's state, parted as this graph parts it; None if another graph parted it otherwise."""
    if not isinstance(param, torch.nn.Parameter):
        return None
    if hasattr(param, "to_local") and not has_share(param):
        warning_once(log, "%s stays dense: it %s", grad.param, SPREAD)
        return None
    state = registry.track(param, grad.param)
    if state.partition is not None and state.shape != tuple(param.shape):
        state = registry.track_anew(param, grad.param)
    if not state.part(grad.partition, config, grad.param):
        log.warning("%s %s; in this one it stays dense", state.name, PARTED)
        return None
    state.table.costs(state.rows, np.array(grad.block_flops, float))
    return state


def together(layout: MaskLayout, params: list[ParamState | None]) -> list[ParamState | None]:
    """Gradients that one product makes are masked together or not at all."""
    made: dict[str, list[int]] = {}
    for i, grad in enumerate(layout.grads):
        made.setdefault(grad.follows or grad.param, []).append(i)
    dense = {i for each in made.values() if any(params[i] is None for i in each) for i in each}
    return [None if i in dense else param for i, param in enumerate(params)]


def tie_groups(layout: MaskLayout, params: Sequence[ParamState | None]) -> None:
    """Blocks that this graph has in one group are one group from now on."""
    called = {grad.param: param for grad, param in zip(layout.grads, params) if param is not None}
    if not called:
        return
    table = BlockTable.of(list(called.values()))
    members: dict[int, list[Member]] = {}
    for grad, param in zip(layout.grads, params):
        if param is not None:
            for block, number in enumerate(grad.groups):
                members.setdefault(number, []).append((param, block))
    by_family: dict[int, list[GroupMembers]] = {}
    for number, group in enumerate(layout.groups):
        if number in members:
            by_family.setdefault(group.family, []).append(GroupMembers(group.start, group.stop, members[number]))
    for number, groups in by_family.items():
        groups.sort(key=lambda group: group.start)  # on each rank its own come first
        family = layout.families[number]
        makers, weights = ([called[n] for n in names if n in called] for names in (family.makers, family.weights))
        tie(table, family.kind, family.role_hash, makers, weights, groups)
    numbers = np.concatenate([param.column("group_of_block") for param in called.values()])
    for mate in table.params_of(np.flatnonzero(np.isin(table.group_of_block, numbers))):
        if mate.pin is not None:
            mate.apply_pin()
