"""What a skipped gradient is taken to be: the optimizer's own first moment, so that momentum stays as it is.

A gradient g that is computed again after `age` steps in a row without it is weighted up around its estimate e:

    g' = e + sqrt(age + 1) (g - e)

Of k = age + 1 steps one was computed. With weight 1 the mean lags k times as long as that of a dense run, with weight k
it is as noisy as one gradient. sqrt(k) keeps the mean square of what the optimizer is told the same as when every step
is computed (k * variance / k), so that Adam's second moment stays what it was; `benchmarks.quality.policies` compares
it with both. Where no mean is kept there is nothing to be weighted up around.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from cacompile.kernels.segments import Batch, StridedPartition, Tables, find_partition, fits
from cacompile.state.params import ParamState
from cacompile.state.shards import local
from cacompile.torch_internals import warning_once

from .optimizers import Term, estimate_of

log = logging.getLogger(__name__)


def weights(skipped: np.ndarray, age: np.ndarray) -> np.ndarray:
    """Weight of what was computed, around the estimate: float32 [G]; 0 where skipped, 1 where it is left as it is.

    skipped: bool [G], in this step; age: int64 [G], steps in a row without it up to the previous one.
    """
    return np.where(skipped, 0.0, np.sqrt(age + 1.0)).astype(np.float32)


Weights = Mapping[ParamState, np.ndarray]
"""Of the blocks of each parameter that is to be filled, see `weights`."""


def to_be_filled(params: Sequence[ParamState], skipped: np.ndarray, age: np.ndarray) -> Weights:
    """Those of the parameters of which something is not left as it is. skipped, age: see `weights`, of all of them."""
    of_all = weights(skipped, age)
    stops = list(itertools.accumulate(param.blocks for param in params))
    changed = np.logical_or.reduceat(of_all != 1.0, [0, *stops[:-1]])
    parts = zip(params, np.split(of_all, stops[:-1]), changed.tolist())
    return {param: of_blocks for param, of_blocks, some in parts if some}


def partition_of(state: ParamState, param: torch.Tensor) -> StridedPartition | None:
    """How a segment table sees the parameter and what lies in memory as it does; None if no table can hold it."""
    if state.partition is None or type(param) is not torch.nn.Parameter or param.layout is not torch.strided:
        return None
    return find_partition(state.shape, param.stride(), state.partition.dim, state.partition.block)


Tensors = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
Filling = tuple[StridedPartition, Tensors, tuple[float, float]]
"""How kernels fill a gradient: partition, (gradient, moment, parameter where it decays), factors of the last two."""


@torch.no_grad()
def fill_together(
    near: Sequence[ParamState],
    left: Weights,
    optimizer: Optimizer,
    settings: Mapping[int, Mapping[str, Any]],
    tables: Tables,
) -> Weights:
    """`fill` for those of `left` that are near, CUDA tensors, by one launch a device and combination of dtypes.

    near: the same ones in every step, so that their tables stay; settings: by the parameter's id. Returns what is left
    to `fill`: those that are not near, and where gradient or state have other strides than the parameter, dtypes that
    no kernel takes, formats of their own, or are not as expected.
    Costs the host about 5 us a parameter, addresses and checks being 2 us a tensor of it (300 parameters, Adam, one
    core of a shared machine), whatever is skipped.
    """
    if not (near and left):
        return left
    batches: dict[tuple[Any, ...], tuple[Batch, list[np.ndarray]]] = {}
    scaler: torch.Tensor | None = getattr(optimizer, "grad_scale", None)  # while unscaling is left to a fused step
    scales: dict[torch.device, torch.Tensor] = {}
    filled = set()
    for state in near:
        if (param := state.param) is None:
            continue
        if (filling := _filling(state, param, optimizer, settings.get(id(param), {}))) is None:
            continue
        filled.add(state)
        partition, tensors, factors = filling
        grad, moment, decayed = tensors
        scale = None
        if scaler is not None and moment is not None and (scale := scales.get(param.device)) is None:
            scale = scales[param.device] = scaler.to(param.device, torch.float32)
        dtype = param.dtype
        key = (
            param.device,
            dtype if grad is None else grad.dtype,
            dtype if moment is None else moment.dtype,
            dtype if decayed is None else decayed.dtype,
        )
        if (held := batches.get(key)) is None:
            held = batches[key] = Batch(), []
        held[0].add(partition, (grad, moment, decayed, scale), factors)
        of_state = left.get(state)
        if of_state is None or grad is None:  # it keeps its place, so that the table stays
            of_state = np.ones(state.blocks, np.float32)
        held[1].append(of_state if moment is not None else np.minimum(of_state, 1.0))
    for (device, *dtypes), (batch, parts) in batches.items():
        if ((of_blocks := np.concatenate(parts)) != 1.0).any():
            from cacompile.kernels.triton_segments import fill_estimates  # torch for CPUs comes without triton

            table = tables.find(batch.partitions, device)
            fill_estimates(table, table.send(batch, of_blocks), dtypes)
    return {state: of_blocks for state, of_blocks in left.items() if state not in filled}


def _filling(
    state: ParamState, param: torch.Tensor, optimizer: Optimizer, settings: Mapping[str, Any]
) -> Filling | None:
    terms: list[Term] = []
    try:
        if state.config.estimate == "momentum":
            terms = estimate_of(optimizer, settings, param)
        moment, by_moment = terms[0] if terms else (None, 0.0)
        decayed, by_param = terms[1] if len(terms) > 1 else (None, 0.0)
        partition, factors = partition_of(state, param), (float(by_moment), float(by_param))
    except Exception:
        return None  # fill says so
    if partition is None or not fits((tensors := (param.grad, moment, decayed)), partition, param.device):
        return None
    return partition, tensors, factors


@torch.no_grad()
def fill(optimizer: Optimizer | None, settings: Mapping[str, Any], state: ParamState, of_blocks: np.ndarray) -> None:
    """Write the estimate into the slices of `param.grad` that were skipped since the last step.

    of_blocks: `weights` of its blocks.
    """
    param = state.param
    if param is None or param.grad is None or state.partition is None:
        return
    if optimizer is not None and state.config.estimate == "momentum":
        try:
            terms = estimate_of(optimizer, settings, param)
            _fill(local(param.grad), state, of_blocks, terms, getattr(optimizer, "grad_scale", None))
            return
        except Exception:
            warning_once(
                log,
                "the state of %s is not as expected: the skipped gradients of its parameters are taken to be zeros",
                type(optimizer).__name__,
                exc_info=True,
            )
    _fill(local(param.grad), state, of_blocks, [], None)


def _fill(
    grad: torch.Tensor, state: ParamState, of_blocks: np.ndarray, terms: list[Term], scale: torch.Tensor | None
) -> None:
    """scale: set while GradScaler leaves unscaling to a fused step."""
    assert state.partition is not None
    dim = state.partition.dim
    held = grad.shape[dim]
    for weight in sorted(set(of_blocks.tolist())):
        if weight == 1.0 or (weight > 0.0 and not terms):
            continue
        for start, length in state.partition.spans(of_blocks == weight, state.held):
            rows, parts = grad, terms
            if length < held:
                rows = grad.narrow(dim, start, length)
                parts = [(t.narrow(dim, start, length), factor) for t, factor in terms]
            as_it_is = scale is None and [(t.dtype, factor) for t, factor in parts] == [(rows.dtype, 1.0)]
            if weight > 0.0 and as_it_is:  # which saves a pass and what it writes to
                estimate = parts[0][0]
            else:
                estimate = rows if weight == 0.0 else torch.empty_like(rows)
                _write(estimate, parts)
                if scale is not None and terms:
                    estimate.mul_(scale.to(rows.device))
            if weight > 0.0:
                torch.lerp(estimate, rows, weight, out=rows)


def _write(estimate: torch.Tensor, terms: Iterable[Term]) -> None:
    first = next(iter(terms := iter(terms)), None)
    if first is None:
        estimate.zero_()
        return
    tensor, factor = first
    estimate.copy_(tensor) if factor == 1.0 else torch.mul(tensor, factor, out=estimate)
    for tensor, factor in terms:
        estimate.add_(tensor, alpha=factor)
