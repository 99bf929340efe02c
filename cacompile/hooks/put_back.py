"""Keeps what is frozen from an optimizer's step: no gradient of whole parameters, groups put back after it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from cacompile.state.frozen import any_frozen, newest_freeze
from cacompile.state.params import ParamState
from cacompile.state.registry import registry
from cacompile.state.shards import local
from cacompile.state.table import newest_structure

Held = tuple[torch.Tensor, torch.Tensor]
"""A view of what a step may change, and what it was."""

_known: weakref.WeakKeyDictionary[Optimizer, tuple[Any, list[ParamState], list[ParamState]]] = (
    weakref.WeakKeyDictionary()
)
_held: weakref.WeakKeyDictionary[Optimizer, list[Held]] = weakref.WeakKeyDictionary()


@torch.no_grad()
def take(optimizer: Optimizer, params: Iterable[Any]) -> None:
    """Before a step: note the frozen slices of these parameters, and of the optimizer's state of the same shape."""
    if not any_frozen():
        return
    whole, in_part = _frozen(optimizer, params)
    for param in (state.param for state in whole):
        if param is not None:
            param.grad = None  # DDP puts its own there, past autograd
    if found := [held for state in in_part for held in _of(state, optimizer)]:
        _held[optimizer] = found


@torch.no_grad()
def put_back(optimizer: Optimizer) -> None:
    """After the step."""
    for view, before in _held.pop(optimizer, ()):
        view.copy_(before)


def _frozen(optimizer: Optimizer, params: Iterable[Any]) -> tuple[list[ParamState], list[ParamState]]:
    """Those that are frozen whole, and those in part; looked for once after each change, as every step asks."""
    params = list(params)
    key = newest_freeze(), newest_structure(), tuple(map(id, params))
    if (known := _known.get(optimizer)) is None or known[0] != key:
        states = [state for state in map(registry.find, params) if state is not None]
        whole = [state for state in states if state.is_frozen]
        in_part = [state for state in states if state.blocks and not state.is_frozen and state.frozen_blocks.any()]
        known = _known[optimizer] = key, whole, in_part
    return known[1], known[2]


def _of(state: ParamState, optimizer: Optimizer) -> Iterable[Held]:
    frozen, param, partition = state.column("frozen") >= 0, state.param, state.partition
    if param is None or partition is None:
        return
    kept = optimizer.state.get(param, {}).values()
    for tensor in (param, *(v for v in kept if isinstance(v, torch.Tensor) and v.shape == param.shape)):
        for start, length in partition.spans(frozen, state.held):
            view = local(tensor).narrow(partition.dim, start, length)
            yield view, view.clone()
