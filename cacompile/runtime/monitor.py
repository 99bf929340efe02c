"""How converged each group is: its expected descent, read from the optimizer's own state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.optim import SGD, Optimizer

from .tracked import Tracked

SMOOTHING = 0.5
"""Weight of the newest of two readings of a gradient that no optimizer state averages."""


class Reading:
    """Scores on their way to the host; taken without waiting for the device."""

    def __init__(self, tracked: Sequence[Tracked], optimizer: Optimizer | None) -> None:
        settings = settings_by_param(optimizer)
        self._taken: list[tuple[Tracked, np.ndarray | None]] = []
        parts: dict[torch.device, list[torch.Tensor]] = {}
        self._order: list[torch.device] = []
        for record in tracked:
            param = record.ref()
            if param is None or record.partition is None:
                continue
            sums, averaged = _descent(optimizer, settings.get(id(param), {}), record, param)
            if sums is None:
                continue
            parts.setdefault(sums.device, []).append(sums)
            self._order.append(sums.device)
            self._taken.append((record, None if averaged else ~record.skipped))
        self._events: list[torch.cuda.Event] = []
        self._host = {device: self._fetch(torch.cat(sums)) for device, sums in parts.items()}

    def _fetch(self, sums: torch.Tensor) -> torch.Tensor:
        if sums.device.type != "cuda":
            return sums.cpu()
        host = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
        host.copy_(sums, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(sums.device))
        self._events.append(event)
        return host

    @property
    def immediate(self) -> bool:
        """True when nothing is still under way: everything was on the host anyway."""
        return not self._events

    def apply(self) -> None:
        """Put the scores into each record's state. Waits only if it is called sooner than the copy takes."""
        for event in self._events:
            event.synchronize()
        start = dict.fromkeys(self._host, 0)
        for (record, sampled), device in zip(self._taken, self._order, strict=True):
            stop = start[device] + record.groups
            fresh = self._host[device][start[device] : stop].double().numpy()
            start[device] = stop
            _learn(record, fresh, sampled)


def settings_by_param(optimizer: Optimizer | None) -> dict[int, Mapping[str, Any]]:
    """Parameter id -> its parameter group's settings."""
    groups = optimizer.param_groups if optimizer is not None else ()
    return {id(param): group for group in groups for param in group["params"]}


@torch.no_grad()
def _descent(
    optimizer: Optimizer | None, settings: Mapping[str, Any], record: Tracked, param: torch.Tensor
) -> tuple[torch.Tensor | None, bool]:
    """Expected descent a group [G] per unit of learning rate, and whether the optimizer has averaged it over steps."""
    state = optimizer.state.get(param, {}) if optimizer is not None else {}
    mean, square = state.get("exp_avg"), state.get("exp_avg_sq")
    if (
        isinstance(mean, torch.Tensor)
        and isinstance(square, torch.Tensor)
        and mean.shape == square.shape == param.shape
    ):
        # the optimizer's own count, a tensor where it lives on the device: not waited for
        step, (beta1, beta2) = state.get("step", record.step), settings.get("betas", (0.9, 0.999))
        rms = (square / (1.0 - beta2**step)).sqrt()
        return _sum_groups((mean / (1.0 - beta1**step)).square() / (rms + settings.get("eps", 1e-8)), record), True
    momentum = state.get("momentum_buffer")
    if isinstance(optimizer, SGD) and isinstance(momentum, torch.Tensor):
        return _sum_groups(momentum.square(), record) * (1.0 - settings["momentum"]) ** 2, True
    return (None, False) if param.grad is None else (_sum_groups(param.grad.square(), record), False)


def _sum_groups(values: torch.Tensor, record: Tracked) -> torch.Tensor:
    """Sum over each block of rows: [rows, ...] -> [G], in the order that is the same every time."""
    assert record.partition is not None
    dim, block, rows = record.partition.dim, record.partition.block, record.partition.rows
    by_row = values.float().sum([d for d in range(values.dim()) if d != dim])
    return torch.nn.functional.pad(by_row, (0, record.groups * block - rows)).view(-1, block).sum(1)


def _learn(record: Tracked, fresh: np.ndarray, sampled: np.ndarray | None) -> None:
    """Take over a reading; `sampled` says which groups' gradients were computed, None that all values are averages."""
    state = record.state
    if sampled is not None:
        # one noisy sample; an output that is not used gives a gradient of zeros, which says nothing
        before = np.where(np.isfinite(state.score), state.score, fresh)
        mixed = SMOOTHING * fresh + (1.0 - SMOOTHING) * before
        fresh = np.where(sampled & fresh.any(), mixed, state.score)
    state.score[:] = np.where(np.isfinite(fresh), fresh, state.score)
    np.fmax(state.peak, state.score, out=state.peak)
