"""How converged each group is: its expected descent, read from the optimizer's own state, and how fast it moves."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from cacompile.kernels.segments import Batch, StridedPartition, Tables, fits
from cacompile.state.measurements import Measurement
from cacompile.state.params import ParamState
from cacompile.state.shards import local
from cacompile.torch_internals import warning_once

from .estimate import partition_of
from .optimizers import Statistic, descent, gradient_statistic, statistic_of
from .spikes import EARLY, was_spike

log = logging.getLogger(__name__)

SMOOTHING = 0.5
"""Weight of the newest of two measurements of a gradient that no optimizer state averages."""


Found = list[tuple[ParamState, Measurement]]
Ratios = Mapping[int, torch.Tensor]
"""A state's id -> movement of its blocks in this step over their size, float32 [blocks] on its device, where known; of
a shard [2, blocks], its part of the squares of both."""


@torch.no_grad()
def measure(states: Sequence[ParamState], optimizer: Optimizer | None, ratios: Ratios) -> Found:
    """Measurements of each parameter's blocks on their way to the host; taken without waiting for the device."""
    settings = settings_by_param(optimizer)
    taken: dict[tuple[torch.device, bool], list[tuple[ParamState, torch.Tensor, bool]]] = {}
    for state in states:
        param = state.param
        if param is None or state.partition is None:
            continue
        sums, averaged = _sums(optimizer, settings.get(id(param), {}), state, param)
        if sums is not None:
            taken.setdefault((sums.device, state.shard is None), []).append((state, sums, averaged))
    found: Found = []
    for parts in taken.values():
        found += _measurements(
            [(r, averaged) for r, _, averaged in parts], torch.cat([sums for _, sums, _ in parts]), ratios
        )
    return found


@torch.no_grad()
def measure_together(
    states: Sequence[ParamState], optimizer: Optimizer | None, tables: Tables, ratios: Ratios
) -> tuple[Found, list[ParamState]]:
    """`measure`, by one reduction for each device, kind of average and combination of dtypes. For CUDA tensors.

    Also returns the parameters that are left to `measure`, as `fill_together` does.
    """
    settings = settings_by_param(optimizer)
    batches: dict[tuple[Any, ...], tuple[Batch, list[tuple[ParamState, bool]]]] = {}
    left = []
    for state in states:
        if (param := state.param) is None:
            continue
        try:
            statistic = statistic_of(optimizer, settings.get(id(param), {}), param, state.step) or gradient_statistic(
                param
            )
            given = _given(statistic, partition_of(state, param), param.device)
        except Exception:
            statistic = given = None  # measure says so
        if statistic is None or given is None:
            left.append(state)
            continue
        adam, partition, (first, last, step), factors = given
        key = param.device, adam, first.dtype, last.dtype
        if (held := batches.get(key)) is None:
            held = batches[key] = Batch(), []
        held[0].add(partition, (first, last if adam else None, step), factors)
        held[1].append((state, statistic.averaged))
    found: Found = []
    for (device, adam, *dtypes), (batch, read) in batches.items():
        from cacompile.kernels.triton_segments import group_sums  # torch for CPUs comes without triton

        table = tables.find(batch.partitions, device)
        found += _measurements(read, group_sums(table, table.send(batch), dtypes, adam), ratios)
    return found, left


def _measurements(states: Sequence[tuple[ParamState, bool]], sums: torch.Tensor, ratios: Ratios) -> Found:
    """states: each with whether its sums are averages, all shards or none; sums: [groups of all of them]."""
    unknown = sums.new_full((1 if states[0][0].shard is None else 2, 1), math.nan)
    known = ((state, ratios.get(id(state))) for state, _ in states)
    each = [
        unknown.expand(-1, state.blocks)
        if ratio is None or ratio.device != sums.device
        else ratio.view(len(unknown), -1)
        for state, ratio in known
    ]
    host, event = fetch(torch.cat([sums[None], torch.cat(each, dim=1)]))
    parts = host.split([state.blocks for state, _ in states], dim=1)
    return [
        (r, Measurement(part, event, None if averaged else ~r.skipped)) for (r, averaged), part in zip(states, parts)
    ]


def fetch(sums: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """A copy on the host, and what tells that it is complete."""
    if sums.device.type != "cuda":
        return sums.cpu(), None
    host = torch.empty(sums.shape, dtype=sums.dtype, device="cpu", pin_memory=True)
    host.copy_(sums, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(sums.device))
    return host, event


def settings_by_param(optimizer: Optimizer | None) -> dict[int, Mapping[str, Any]]:
    """Parameter id -> its parameter group's settings."""
    groups = optimizer.param_groups if optimizer is not None else ()
    return {id(param): group for group in groups for param in group["params"]}


def _sums(
    optimizer: Optimizer | None, settings: Mapping[str, Any], state: ParamState, param: torch.Tensor
) -> tuple[torch.Tensor | None, bool]:
    """Expected descent a group [G] per unit of learning rate, and whether the optimizer has averaged it over steps."""
    try:
        if (statistic := statistic_of(optimizer, settings, param, state.step)) is not None:
            values, shape = descent(statistic), local(param).shape
            if values.shape != shape:
                raise TypeError(f"a descent must have the shape {list(shape)}, got {list(values.shape)}")
            return sum_groups(values, state), statistic.averaged
    except Exception:
        warning_once(
            log,
            "the state of %s is not as expected: groups of its parameters are judged by the gradients of one step",
            type(optimizer).__name__,
            exc_info=True,
        )
    gradient = gradient_statistic(param)
    return (None if gradient is None else sum_groups(descent(gradient), state)), False


Moments = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
Given = tuple[bool, StridedPartition, Moments, tuple[float, float, float]]
"""What `group_sums` takes of a parameter: adam, its partition, (mean, mean square, step), factors."""


def _given(statistic: Statistic | None, partition: StridedPartition | None, device: torch.device) -> Given | None:
    """None where a kernel cannot read it, or would have to wait for numbers that are on the device."""
    if statistic is None or statistic.rule is not None:
        return None
    if partition is None or not fits(statistic.tensors, partition, device):
        return None
    tensors, factors, step = statistic.tensors, statistic.factors, statistic.step
    if any(isinstance(factor, torch.Tensor) for factor in factors):
        return None
    if len(tensors) == 1:
        return False, partition, (tensors[0], tensors[0], None), (factors[0], 0.0, 0.0)
    beta1, beta2, eps = factors
    if not isinstance(step, torch.Tensor) or step.device.type == "cpu" != device.type:
        count = float(step)
        return True, partition, (*tensors, None), (1.0 / (1.0 - beta1**count), 1.0 / (1.0 - beta2**count), eps)
    if step.device != device or step.dtype != torch.float32 or step.numel() != 1:
        return None
    return True, partition, (*tensors, step), (_log2(beta1), _log2(beta2), eps)


def _log2(beta: float) -> float:
    return math.log2(beta) if beta > 0.0 else -math.inf


def sum_groups(values: torch.Tensor, state: ParamState) -> torch.Tensor:
    """Sum over each block of rows: [rows that this rank holds, ...] -> [G], in an order that is the same every time."""
    assert state.partition is not None
    dim, block = state.partition.dim, state.partition.block
    first, last = state.held
    by_row = values.float().sum([d for d in range(values.dim()) if d != dim])
    return torch.nn.functional.pad(by_row, (first, state.blocks * block - last)).view(-1, block).sum(1)


def learn(param: ParamState, measurement: Measurement, rate: float = 1.0) -> None:
    """Take a measurement over into the parameter's rows of the table. rate: learning rate, 1 for what has none."""
    (fresh, ratio), sampled = measurement.values(), measurement.sampled
    score, known = param.column("score"), param.column("update_ratio")
    if sampled is not None:
        # one noisy sample; an output that is not used gives a gradient of zeros, which says nothing
        before = np.where(np.isfinite(score), score, fresh)
        weight = 1.0 if _was_spike(param, fresh, rate) else SMOOTHING
        mixed = weight * fresh + (1.0 - weight) * before
        fresh = np.where(sampled & fresh.any(), mixed, score)
    score[:] = np.where(np.isfinite(fresh), fresh, score)
    if sampled is not None:  # without a mean of gradients, what is skipped stands still
        ratio = np.where(sampled, ratio, np.nan)
    known[:] = np.where(np.isnan(ratio), known, ratio)


def _was_spike(param: ParamState, fresh: np.ndarray, rate: float) -> bool:
    """Whether a parameter's scores are those of a jump, which the next measurement should not be averaged with."""
    early = param.step <= EARLY * param.config.monitor_every
    return was_spike(param.column("mean_descent"), fresh * rate, param.column("score") * rate, early=early)
