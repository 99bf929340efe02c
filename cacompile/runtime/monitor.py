"""How converged each group is: its expected descent, read from the optimizer's own state, and how fast it moves."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch._logging import warning_once
from torch.optim import Optimizer

from cacompile.kernels.segments import Batch, Cut, Tables, fits

from .estimate import cut_of
from .readings import Scores
from .sources import Source, descent, gradient_of, source_of
from .tracked import Tracked

log = logging.getLogger(__name__)

SMOOTHING = 0.5
"""Weight of the newest of two readings of a gradient that no optimizer state averages."""


Found = list[tuple[Tracked, Scores]]
Speeds = Mapping[int, torch.Tensor]
"""A record's id -> movement of its blocks in this step over their size, float32 [G] on its device, where known."""


@torch.no_grad()
def read_scores(tracked: Sequence[Tracked], optimizer: Optimizer | None, speeds: Speeds) -> Found:
    """Scores of each parameter's groups on their way to the host; taken without waiting for the device."""
    settings = settings_by_param(optimizer)
    taken: dict[torch.device, list[tuple[Tracked, torch.Tensor, bool]]] = {}
    for record in tracked:
        param = record.ref()
        if param is None or record.partition is None:
            continue
        sums, averaged = _sums(optimizer, settings.get(id(param), {}), record, param)
        if sums is not None:
            taken.setdefault(sums.device, []).append((record, sums, averaged))
    found: Found = []
    for parts in taken.values():
        found += _scores([(r, averaged) for r, _, averaged in parts], torch.cat([sums for _, sums, _ in parts]), speeds)
    return found


@torch.no_grad()
def read_together(
    tracked: Sequence[Tracked], optimizer: Optimizer | None, tables: Tables, speeds: Speeds
) -> tuple[Found, list[Tracked]]:
    """`read_scores` by one reduction for each device, kind of average and combination of dtypes. For CUDA tensors.

    Also returns the records that are left to `read_scores`, as `fill_together` does.
    """
    settings = settings_by_param(optimizer)
    batches: dict[tuple[Any, ...], tuple[Batch, list[tuple[Tracked, bool]]]] = {}
    left = []
    for record in tracked:
        if (param := record.ref()) is None:
            continue
        try:
            source = source_of(optimizer, settings.get(id(param), {}), param, record.step) or gradient_of(param)
            given = _given(source, cut_of(record, param), param.device)
        except Exception:
            source = given = None  # read_scores says so
        if source is None or given is None:
            left.append(record)
            continue
        adam, cut, (first, last, step), factors = given
        key = param.device, adam, first.dtype, last.dtype
        if (held := batches.get(key)) is None:
            held = batches[key] = Batch(), []
        held[0].add(cut, (first, last if adam else None, step), factors)
        held[1].append((record, source.averaged))
    found: Found = []
    for (device, adam, *dtypes), (batch, records) in batches.items():
        from cacompile.kernels.triton_segments import group_sums  # torch for CPUs comes without triton

        table = tables.find(batch.cuts, device)
        found += _scores(records, group_sums(table, table.send(batch), dtypes, adam), speeds)
    return found, left


def _scores(records: Sequence[tuple[Tracked, bool]], sums: torch.Tensor, speeds: Speeds) -> Found:
    """records: each with whether its sums are averages; sums: [groups of all of them]."""
    unknown = sums.new_full((1,), math.nan)
    known = ((record, speeds.get(id(record))) for record, _ in records)
    each = [
        unknown.expand(record.groups) if speed is None or speed.device != sums.device else speed
        for record, speed in known
    ]
    host, event = _fetch(torch.stack([sums, torch.cat(each)]))
    parts = host.split([record.groups for record, _ in records], dim=1)
    return [(r, Scores(part, event, None if averaged else ~r.skipped)) for (r, averaged), part in zip(records, parts)]


def _fetch(sums: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
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
    optimizer: Optimizer | None, settings: Mapping[str, Any], record: Tracked, param: torch.Tensor
) -> tuple[torch.Tensor | None, bool]:
    """Expected descent a group [G] per unit of learning rate, and whether the optimizer has averaged it over steps."""
    try:
        if (source := source_of(optimizer, settings, param, record.step)) is not None:
            return sum_groups(descent(source), record), source.averaged
    except Exception:
        warning_once(
            log,
            "the state of %s is not as expected: groups of its parameters are judged by the gradients of one step",
            type(optimizer).__name__,
            exc_info=True,
        )
    gradient = gradient_of(param)
    return (None if gradient is None else sum_groups(descent(gradient), record)), False


Given = tuple[bool, Cut, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], tuple[float, float, float]]
"""What `group_sums` takes of a parameter: adam, its cut, (mean, mean square, step), factors."""


def _given(source: Source | None, cut: Cut | None, device: torch.device) -> Given | None:
    """None where a kernel cannot read it, or would have to wait for numbers that are on the device."""
    if source is None or source.rule is not None or cut is None or not fits(source.tensors, cut, device):
        return None
    tensors, factors, step = source.tensors, source.factors, source.step
    if any(isinstance(factor, torch.Tensor) for factor in factors):
        return None
    if len(tensors) == 1:
        return False, cut, (tensors[0], tensors[0], None), (factors[0], 0.0, 0.0)
    beta1, beta2, eps = factors
    if not isinstance(step, torch.Tensor) or step.device.type == "cpu" != device.type:
        count = float(step)
        return True, cut, (*tensors, None), (1.0 / (1.0 - beta1**count), 1.0 / (1.0 - beta2**count), eps)
    if step.device != device or step.dtype != torch.float32 or step.numel() != 1:
        return None
    return True, cut, (*tensors, step), (_log2(beta1), _log2(beta2), eps)


def _log2(beta: float) -> float:
    return math.log2(beta) if beta > 0.0 else -math.inf


def sum_groups(values: torch.Tensor, record: Tracked) -> torch.Tensor:
    """Sum over each block of rows: [rows, ...] -> [G], in the order that is the same every time."""
    assert record.partition is not None
    dim, block, rows = record.partition.dim, record.partition.block, record.partition.rows
    by_row = values.float().sum([d for d in range(values.dim()) if d != dim])
    return torch.nn.functional.pad(by_row, (0, record.groups * block - rows)).view(-1, block).sum(1)


def learn(record: Tracked, scores: Scores) -> None:
    """Take a reading over into the record's state."""
    state, (fresh, speed), sampled = record.state, scores.values(), scores.sampled
    if sampled is not None:
        # one noisy sample; an output that is not used gives a gradient of zeros, which says nothing
        before = np.where(np.isfinite(state.score), state.score, fresh)
        mixed = SMOOTHING * fresh + (1.0 - SMOOTHING) * before
        fresh = np.where(sampled & fresh.any(), mixed, state.score)
    state.score[:] = np.where(np.isfinite(fresh), fresh, state.score)
    if sampled is not None:  # without a mean of gradients, what is skipped stands still
        speed = np.where(sampled, speed, np.nan)
    state.speed[:] = np.where(np.isnan(speed), state.speed, speed)
