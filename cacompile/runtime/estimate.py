"""What a skipped gradient is taken to be: the optimizer's own first moment, so that momentum stays as it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.optim import SGD, Adam, Adamax, NAdam, Optimizer, RAdam

from .tracked import Tracked

Term = tuple[torch.Tensor, float]

COUPLED = (Adam, Adamax, NAdam, RAdam, SGD)
"""Optimizers that add weight decay to the gradient, unless `decoupled_weight_decay` is set; others apply it apart."""


def first_moment(optimizer: Optimizer, settings: Mapping[str, Any], param: torch.Tensor) -> list[Term]:
    """The gradient that leaves the optimizer's first moment unchanged, as a sum of tensor * factor; empty for zeros.

    Adam's family keeps m = b1 m + (1 - b1) g: g = m does it. SGD keeps b = mu b + (1 - dampening) g:
    g = (1 - mu) / (1 - dampening) b. Weight decay that is added to the gradient is taken out again,
    and `maximize` turns the sign.
    """
    state = optimizer.state.get(param, {})
    sign = -1.0 if settings.get("maximize", False) else 1.0
    if isinstance(optimizer, SGD):
        moment, factor = state.get("momentum_buffer"), 1.0
        if moment is not None and settings["dampening"] != 1:
            factor = (1.0 - settings["momentum"]) / (1.0 - settings["dampening"])
    elif type(optimizer).__name__ == "Muon":  # torch.optim.Muon: b.lerp_(g, 1 - mu)
        moment, factor = state.get("momentum_buffer"), 1.0
    else:
        moment, factor = state.get("exp_avg"), 1.0
    if not isinstance(moment, torch.Tensor) or moment.shape != param.shape or moment.dtype.is_complex:
        return []
    terms = [(moment, sign * factor)]
    coupled = isinstance(optimizer, COUPLED) and not settings.get("decoupled_weight_decay", False)
    if coupled and settings["weight_decay"]:
        terms.append((param.detach(), -sign * settings["weight_decay"]))
    return terms


@torch.no_grad()
def fill_skipped(optimizer: Optimizer | None, settings: Mapping[str, Any], tracked: Tracked) -> None:
    """Write the estimate into the slices of `param.grad` that were skipped since the last step."""
    param = tracked.ref()
    if param is None or param.grad is None or tracked.partition is None:
        return
    wanted = optimizer is not None and tracked.config.estimate == "momentum"
    terms = first_moment(optimizer, settings, param) if wanted else []
    scale = getattr(optimizer, "grad_scale", None)  # set while GradScaler leaves unscaling to a fused step
    for start, length in tracked.partition.spans(tracked.skipped):
        rows = param.grad.narrow(tracked.partition.dim, start, length)
        _write(rows, ((t.narrow(tracked.partition.dim, start, length), factor) for t, factor in terms))
        if scale is not None and terms:
            rows.mul_(scale.to(rows.device))


def _write(rows: torch.Tensor, terms: Iterable[Term]) -> None:
    first = next(iter(terms := iter(terms)), None)
    if first is None:
        rows.zero_()
        return
    tensor, factor = first
    rows.copy_(tensor) if factor == 1.0 else torch.mul(tensor, factor, out=rows)
    for tensor, factor in terms:
        rows.add_(tensor, alpha=factor)
