"""A parameter that was skipped whole lends its first moment as its gradient: nothing is written, nothing is read twice.

    m' = m + (1 - beta1) (g - m) = m, where g is m itself

As the estimate is m, this is what filling it in gives, to the last bit, without a pass over memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.optim import Adam, AdamW, Optimizer

from cacompile.state.params import ParamState

from .optimizers import estimate_of

LENDERS = (Adam, AdamW)
"""Optimizers that read gradients and write none, whatever else they write is read before: derived ones may do more."""

Loan = tuple[torch.nn.Parameter, torch.Tensor, torch.Tensor]
"""A parameter, its own gradient, and the moment that stands in its place."""

_lent: weakref.WeakKeyDictionary[Optimizer, list[Loan]] = weakref.WeakKeyDictionary()
"""Until the step is done."""


def lend(
    optimizer: Optimizer, settings: Mapping[int, Mapping[str, Any]], states: Mapping[ParamState, np.ndarray]
) -> Mapping[ParamState, np.ndarray]:
    """Give the optimizer, for its step, the moments of what was skipped whole; returns what is left to be filled.

    settings: by the parameter's id; states: with `estimate.weights`. For a step that neither Dynamo traces nor a CUDA
    graph records: both hold on to what they see. With a scale that the step takes from the gradients it would write
    them.
    """
    take_back(optimizer)  # of a step that has raised
    if type(optimizer) not in LENDERS or getattr(optimizer, "grad_scale", None) is not None:
        return states
    lent, left = _lent.setdefault(optimizer, []), {}
    for state, of_blocks in states.items():
        moment = None if of_blocks.any() else _moment(optimizer, settings, state)
        if moment is None:
            left[state] = of_blocks
            continue
        param = state.param
        assert param is not None and param.grad is not None
        lent.append((param, param.grad, moment))
        param.grad = moment
    return left


def take_back(optimizer: Optimizer) -> None:
    """The step is done: parameters have their own gradients again, but those that have got others since."""
    for param, grad, moment in _lent.pop(optimizer, ()):
        if param.grad is moment:
            param.grad = grad


def _moment(optimizer: Optimizer, settings: Mapping[int, Mapping[str, Any]], state: ParamState) -> torch.Tensor | None:
    """The tensor that is the whole estimate of the parameter's gradient, and may stand in its place; None if none."""
    if state.config.estimate != "momentum":
        return None
    param, partition = state.param, state.partition
    grad = None if param is None else param.grad
    if param is None or grad is None or state.shard is not None or type(param) is not torch.nn.Parameter:
        return None
    if partition is None or partition.rows != state.shape[partition.dim]:
        return None
    of = settings.get(id(param), {})
    try:
        terms = estimate_of(optimizer, of, param)
    except Exception:
        return None  # fill says so
    if len(terms) != 1 or terms[0][1] != 1.0 or of.get("differentiable", False):
        return None
    moment = terms[0][0]
    alike = moment.dtype == grad.dtype and moment.device == grad.device and moment.stride() == grad.stride()
    return moment if alike else None
