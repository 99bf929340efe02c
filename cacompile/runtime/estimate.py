"""What a skipped gradient is taken to be: the optimizer's own first moment, so that momentum stays as it is."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch._logging import warning_once
from torch.optim import SGD, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam

from cacompile.kernels.segments import Batch, Cut, Tables, find_cut, fits

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
    kind: Any = type(optimizer)
    return _moment_of(kind)


@functools.cache  # asked for every parameter in every step
def _moment_of(optimizer_type: type) -> str | None:
    for name, classes in AVERAGED.items():
        if issubclass(optimizer_type, classes):
            return name
    return NAMED.get(optimizer_type.__name__)


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
        terms.append((param, -sign * settings["weight_decay"]))
    return terms


def cut_of(tracked: Tracked, param: torch.Tensor) -> Cut | None:
    """How a segment table sees the parameter and what lies in memory as it does; None if no table can hold it."""
    if tracked.partition is None or type(param) is not torch.nn.Parameter or param.layout is not torch.strided:
        return None
    return find_cut(tracked.shape, param.stride(), tracked.partition.dim, tracked.partition.block)


Tensors = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
Filling = tuple[Cut, Tensors, tuple[float, float]]
"""How kernels may fill a parameter: its cut, (gradient, moment, parameter where it decays), factors of the last two."""


@torch.no_grad()
def fill_together(
    records: Sequence[Tracked], optimizer: Optimizer, settings: Mapping[int, Mapping[str, Any]], tables: Tables
) -> list[Tracked]:
    """`fill_skipped` for all records by one launch a device and combination of dtypes. For CUDA tensors.

    settings: by the parameter's id. Returns the records that are left to `fill_skipped`: where gradient or state have
    other strides than the parameter, dtypes that no kernel takes, formats of their own, or are not as expected.
    Costs the host about 5 us a parameter, addresses and checks being 2 us a tensor of it (300 parameters, Adam, one
    core of a shared machine), whatever is skipped.
    """
    batches: dict[tuple[Any, ...], tuple[Batch, list[np.ndarray]]] = {}
    scaler: torch.Tensor | None = getattr(optimizer, "grad_scale", None)  # while unscaling is left to a fused step
    scales: dict[torch.device, torch.Tensor] = {}
    left = []
    for record in records:
        if (param := record.ref()) is None:
            continue
        if (filling := _filling(record, param, optimizer, settings.get(id(param), {}))) is None:
            left.append(record)
            continue
        cut, tensors, factors = filling
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
        held[0].add(cut, (grad, moment, decayed, scale), factors)
        # a parameter without a gradient keeps its place, so that the table stays
        held[1].append(record.skipped if grad is not None else np.zeros_like(record.skipped))
    for (device, *dtypes), (batch, each) in batches.items():
        if (chosen_blocks := np.concatenate(each)).any():
            from cacompile.kernels.triton_segments import fill_estimates  # torch for CPUs comes without triton

            table = tables.find(batch.cuts, device)
            fill_estimates(table, table.send(batch, chosen_blocks), dtypes)
    return left


def _filling(record: Tracked, param: torch.Tensor, optimizer: Optimizer, settings: Mapping[str, Any]) -> Filling | None:
    terms: list[Term] = []
    try:
        if record.config.estimate == "momentum":
            terms = first_moment(optimizer, settings, param)
        moment, by_moment = terms[0] if terms else (None, 0.0)
        decayed, by_param = terms[1] if len(terms) > 1 else (None, 0.0)
        cut, factors = cut_of(record, param), (float(by_moment), float(by_param))
    except Exception:
        return None  # fill_skipped says so
    if cut is None or not fits((tensors := (param.grad, moment, decayed)), cut, param.device):
        return None
    return cut, tensors, factors


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
