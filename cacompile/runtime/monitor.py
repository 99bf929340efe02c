"""How converged each group is: its expected descent, read from the optimizer's own state."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch._logging import warning_once
from torch.optim import SGD, Optimizer

from .estimate import moment_name
from .tracked import Scores, Tracked

log = logging.getLogger(__name__)

SMOOTHING = 0.5
"""Weight of the newest of two readings of a gradient that no optimizer state averages."""


def read_scores(tracked: Sequence[Tracked], optimizer: Optimizer | None) -> list[tuple[Tracked, Scores]]:
    """Scores of each parameter's groups on their way to the host; taken without waiting for the device."""
    settings = settings_by_param(optimizer)
    taken: dict[torch.device, list[tuple[Tracked, torch.Tensor, bool]]] = {}
    for record in tracked:
        param = record.ref()
        if param is None or record.partition is None:
            continue
        sums, averaged = _descent(optimizer, settings.get(id(param), {}), record, param)
        if sums is not None:
            taken.setdefault(sums.device, []).append((record, sums, averaged))
    found = []
    for parts in taken.values():
        host, event = _fetch(torch.cat([sums for _, sums, _ in parts]))
        for (record, _, averaged), values in zip(parts, host.split([record.groups for record, *_ in parts])):
            found.append((record, Scores(values, event, None if averaged else ~record.skipped)))
    return found


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


@torch.no_grad()
def _descent(
    optimizer: Optimizer | None, settings: Mapping[str, Any], record: Tracked, param: torch.Tensor
) -> tuple[torch.Tensor | None, bool]:
    """Expected descent a group [G] per unit of learning rate, and whether the optimizer has averaged it over steps."""
    if optimizer is not None:
        try:
            if (descent := _averaged(optimizer, settings, record, param)) is not None:
                return _sum_groups(descent, record), True
        except Exception:
            warning_once(
                log,
                "the state of %s is not as expected: groups of its parameters are judged by the gradients of one step",
                type(optimizer).__name__,
                exc_info=True,
            )
    return (None, False) if param.grad is None else (_sum_groups(param.grad.square(), record), False)


def _averaged(
    optimizer: Optimizer, settings: Mapping[str, Any], record: Tracked, param: torch.Tensor
) -> torch.Tensor | None:
    """Expected descent of each element, from the averages that the optimizer keeps; None where none are known."""
    name, state = moment_name(optimizer), optimizer.state.get(param, {})
    mean, square = state.get(name), state.get("exp_avg_sq")
    if (
        name == "exp_avg"
        and isinstance(mean, torch.Tensor)
        and isinstance(square, torch.Tensor)
        and mean.shape == square.shape == param.shape
    ):
        # the optimizer's own count, a tensor where it lives on the device: not waited for
        step, (beta1, beta2) = state.get("step", record.step), settings.get("betas", (0.9, 0.999))
        rms = (square / (1.0 - beta2**step)).sqrt()
        return (mean / (1.0 - beta1**step)).square() / (rms + settings.get("eps", 1e-8))
    if isinstance(optimizer, SGD) and isinstance(mean, torch.Tensor):
        return mean.square() * (1.0 - settings["momentum"]) ** 2
    return None


def _sum_groups(values: torch.Tensor, record: Tracked) -> torch.Tensor:
    """Sum over each block of rows: [rows, ...] -> [G], in the order that is the same every time."""
    assert record.partition is not None
    dim, block, rows = record.partition.dim, record.partition.block, record.partition.rows
    by_row = values.float().sum([d for d in range(values.dim()) if d != dim])
    return torch.nn.functional.pad(by_row, (0, record.groups * block - rows)).view(-1, block).sum(1)


def learn(record: Tracked, scores: Scores) -> None:
    """Take a reading over into the record's state."""
    state, fresh, sampled = record.state, scores.values(), scores.sampled
    if sampled is not None:
        # one noisy sample; an output that is not used gives a gradient of zeros, which says nothing
        before = np.where(np.isfinite(state.score), state.score, fresh)
        mixed = SMOOTHING * fresh + (1.0 - SMOOTHING) * before
        fresh = np.where(sampled & fresh.any(), mixed, state.score)
    state.score[:] = np.where(np.isfinite(fresh), fresh, state.score)
    np.fmax(state.peak, state.score, out=state.peak)
