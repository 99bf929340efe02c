"""What a skipped gradient is taken to be: the optimizer's own first moment, so that momentum stays as it is."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch._logging import warning_once
from torch.optim import SGD, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam

from .tracked import Tracked

log = logging.getLogger(__name__)

Term = tuple[torch.Tensor, float]

COUPLED = (Adam, Adamax, NAdam, RAdam, SGD)
"""Optimizers that add weight decay to the gradient, unless `decoupled_weight_decay` is set; others apply it apart."""

AVERAGED: dict[str, tuple[type, ...]] = {
    "exp_avg": (Adam, AdamW, Adamax, NAdam, RAdam),
    # torch.optim.Muon: b.lerp_(g, 1 - mu). Not in every torch; others of that name keep a sum
    "momentum_buffer": (SGD, *([torch.optim.Muon] if hasattr(torch.optim, "Muon") else [])),
}
"""State -> the optimizers that keep a running mean of their gradients in it. Others may call anything by that name."""

NAMED = {"AdamW": "exp_avg", "Lion": "exp_avg"}
"""The same for classes outside torch, by name: AdamW of transformers, Lion (a mean with its second beta)."""


def moment_name(optimizer: Optimizer | None) -> str | None:
    """Under which name the optimizer's state holds the mean of gradients; None where that is not known."""
    for name, classes in AVERAGED.items():
        if isinstance(optimizer, classes):
            return name
    return NAMED.get(type(optimizer).__name__)


def first_moment(optimizer: Optimizer, settings: Mapping[str, Any], param: torch.Tensor) -> list[Term]:
    """The gradient that leaves the optimizer's first moment unchanged, as a sum of tensor * factor; empty for zeros.

    Adam's family keeps m = b1 m + (1 - b1) g: g = m does it. SGD keeps b = mu b + (1 - dampening) g:
    g = (1 - mu) / (1 - dampening) b. Weight decay that is added to the gradient is taken out again,
    and `maximize` turns the sign. Of an optimizer that is not known nothing is assumed: zeros.
    """
    state = optimizer.state.get(param, {})
    sign = -1.0 if settings.get("maximize", False) else 1.0
    moment, factor = state.get(moment_name(optimizer)), 1.0
    if isinstance(optimizer, SGD) and moment is not None and settings["dampening"] != 1:
        factor = (1.0 - settings["momentum"]) / (1.0 - settings["dampening"])
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
    if optimizer is not None and tracked.config.estimate == "momentum":
        try:
            _fill(param.grad, tracked, first_moment(optimizer, settings, param), getattr(optimizer, "grad_scale", None))
            return
        except Exception:
            warning_once(
                log,
                "the state of %s is not as expected: the skipped gradients of its parameters are taken to be zeros",
                type(optimizer).__name__,
                exc_info=True,
            )
    _fill(param.grad, tracked, [], None)


def _fill(grad: torch.Tensor, tracked: Tracked, terms: list[Term], scale: torch.Tensor | None) -> None:
    """scale: set while GradScaler leaves unscaling to a fused step."""
    assert tracked.partition is not None
    dim = tracked.partition.dim
    for start, length in tracked.partition.spans(tracked.skipped):
        rows = grad.narrow(dim, start, length)
        _write(rows, ((t.narrow(dim, start, length), factor) for t, factor in terms))
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
