"""What a skipped gradient is taken to be: the optimizer's own first moment, so that momentum stays as it is.

A gradient g that is computed again after `age` steps in a row without it is weighted up around its estimate e:

    g' = e + sqrt(age + 1) (g - e)

Of k = age + 1 steps one was computed. With weight 1 the mean lags k times as long as that of a dense run, with weight k
it is as noisy as one gradient. sqrt(k) keeps the mean square of what the optimizer is told the same as when every step
is computed (k * variance / k), so that Adam's second moment stays what it was; `benchmarks/policies.py` compares
it with both. Where no mean is kept there is nothing to be weighted up around.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch._logging import warning_once
from torch.optim import SGD, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from cacompile.kernels.segments import Batch, Cut, Tables, find_cut, fits

from .tracked import Tracked

log = logging.getLogger(__name__)

Term = tuple[torch.Tensor, float]

COUPLED = (Adam, Adamax, NAdam, RAdam, RMSprop, SGD)
"""Optimizers that add weight decay to the gradient, unless `decoupled_weight_decay` is set; others apply it apart."""

AVERAGED: dict[str, tuple[type, ...]] = {
    "exp_avg": (Adam, AdamW, Adamax, NAdam, RAdam),
    # torch.optim.Muon: b.lerp_(g, 1 - mu). Not in every torch; others of that name keep a sum
    "momentum_buffer": (SGD, *([torch.optim.Muon] if hasattr(torch.optim, "Muon") else [])),
}
"""State -> the optimizers that keep a running mean of their gradients in it. Others may call anything by that name."""

NAMED = {
    **dict.fromkeys(("AdamW", "Lion"), "exp_avg"),
    # pytorch_optimizer, torch_optimizer
    **dict.fromkeys(
        ("AdaBelief", "AdaBound", "AdamP", "Adan", "DiffGrad", "Lamb", "RAdam", "StableAdamW", "Yogi"), "exp_avg"
    ),
    "Adam_mini": "m",
}
"""The same for classes outside torch, by name (Lion's is a mean with its second beta); seen in docs/pipelines.md."""

ELSEWHERE = {("bitsandbytes", "exp_avg"): "state1"}
"""(package, state) -> what that package calls it."""


def moment_name(optimizer: Optimizer | None) -> str | None:
    """Under which name the optimizer's state holds the mean of gradients; None where that is not known."""
    kind: Any = type(optimizer)
    return _moment_of(kind)


@functools.cache  # asked for every parameter in every step
def _moment_of(optimizer_type: type) -> str | None:
    for name, classes in AVERAGED.items():
        if issubclass(optimizer_type, classes):
            return name
    if (named := NAMED.get(optimizer_type.__name__)) is None:
        return None
    return ELSEWHERE.get((optimizer_type.__module__.partition(".")[0], named), named)


def keeps_mean(optimizer: Optimizer) -> bool:
    """Whether it is known to keep a mean of gradients, which estimates can be read from."""
    return isinstance(optimizer, RMSprop) or moment_name(optimizer) is not None


def first_moment(optimizer: Optimizer, settings: Mapping[str, Any], param: torch.Tensor) -> list[Term]:
    """The gradient that leaves the optimizer's first moment unchanged, as a sum of tensor * factor; empty for zeros.

    Adam's family, Muon and Lion keep m = b1 m + (1 - b1) g: g = m does it. SGD keeps b = mu b + (1 - dampening) g:
    g = (1 - mu) / (1 - dampening) b. RMSprop with momentum keeps b = mu b + g / rms: g = (1 - mu) rms b, nearly, as the
    step changes the rms that it divides by: where the mean is below it, b grows by up to (1 - mu) (1 - alpha) / 2 of
    itself, 0.05 % if mu is 0.9. Weight decay that is added to the gradient is taken out again, and `maximize` turns the
    sign.

    Zeros where no mean of gradients is kept: plain SGD and RMSprop, Adagrad, Adafactor. Squares alone do not tell which
    way to go. Centered RMSprop's mean does not count: as a gradient it takes its own variance, which updates are
    divided by, to zero. Of an optimizer that is not known nothing is assumed: zeros.
    """
    state = optimizer.state.get(param, {})
    sign = -1.0 if settings.get("maximize", False) else 1.0
    moment, factor = state.get(moment_name(optimizer)), 1.0
    if isinstance(optimizer, SGD) and moment is not None:
        # what an earlier momentum has left is not read any more
        moment, factor = moment if settings["momentum"] else None, mean_of_sum(settings)
    elif isinstance(optimizer, RMSprop) and settings["momentum"] > 0 and "momentum_buffer" in state:
        moment, factor = state["momentum_buffer"] * rms_of(state, settings), 1.0 - settings["momentum"]
    if not isinstance(moment, torch.Tensor) or moment.shape != param.shape or not moment.is_floating_point():
        return []
    terms = [(moment, sign * factor)]
    coupled = isinstance(optimizer, COUPLED) and not settings.get("decoupled_weight_decay", False)
    if coupled and settings["weight_decay"]:
        terms.append((param, -sign * settings["weight_decay"]))
    return terms


def mean_of_sum(settings: Mapping[str, Any]) -> float:
    """What SGD's buffer is multiplied by to give the mean gradient; 1 where it takes no gradients up any more."""
    if settings["dampening"] == 1:
        return 1.0
    return (1.0 - settings["momentum"]) / (1.0 - settings["dampening"])


def rms_of(state: Mapping[str, Any], settings: Mapping[str, Any]) -> torch.Tensor:
    """What RMSprop divides gradients by: the root of its mean square, or of its variance if centered, plus eps."""
    square = state["square_avg"]
    if settings["centered"]:
        square = square.addcmul(state["grad_avg"], state["grad_avg"], value=-1).clamp_(min=0.0)
    return square.sqrt().add_(settings["eps"])


def weights(skipped: np.ndarray, age: np.ndarray) -> np.ndarray:
    """Weight of what was computed, around the estimate: float32 [G]; 0 where skipped, 1 where it is left as it is.

    skipped: bool [G], in this step; age: int64 [G], steps in a row without it up to the previous one.
    """
    return np.where(skipped, 0.0, np.sqrt(age + 1.0)).astype(np.float32)


def cut_of(tracked: Tracked, param: torch.Tensor) -> Cut | None:
    """How a segment table sees the parameter and what lies in memory as it does; None if no table can hold it."""
    if tracked.partition is None or type(param) is not torch.nn.Parameter or param.layout is not torch.strided:
        return None
    return find_cut(tracked.shape, param.stride(), tracked.partition.dim, tracked.partition.block)


Tensors = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
Filling = tuple[Cut, Tensors, tuple[float, float]]
"""How kernels may fill a gradient: its cut, (gradient, moment, parameter where it decays), factors of the last two."""


@torch.no_grad()
def fill_together(
    records: Sequence[Tracked], optimizer: Optimizer, settings: Mapping[int, Mapping[str, Any]], tables: Tables
) -> list[Tracked]:
    """`fill` for all records by one launch a device and combination of dtypes. For CUDA tensors.

    settings: by the parameter's id. Returns the records that are left to `fill`: where gradient or state have
    other strides than the parameter, dtypes that no kernel takes, formats of their own, or are not as expected.
    Costs the host about 5 us a parameter, addresses and checks being 2 us a tensor of it (300 parameters, Adam, one
    core of a shared machine), whatever is skipped.
    """
    batches: dict[tuple[Any, ...], tuple[Batch, list[np.ndarray], list[np.ndarray]]] = {}
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
            held = batches[key] = Batch(), [], []
        held[0].add(cut, (grad, moment, decayed, scale), factors)
        # a parameter without a gradient keeps its place, so that the table stays
        held[1].append(record.skipped if grad is not None else np.zeros_like(record.skipped))
        held[2].append(record.state.age if grad is not None and moment is not None else np.zeros_like(record.state.age))
    for (device, *dtypes), (batch, skipped, ages) in batches.items():
        if ((of_blocks := weights(np.concatenate(skipped), np.concatenate(ages))) != 1.0).any():
            from cacompile.kernels.triton_segments import fill_estimates  # torch for CPUs comes without triton

            table = tables.find(batch.cuts, device)
            fill_estimates(table, table.send(batch, of_blocks), dtypes)
    return left


def _filling(record: Tracked, param: torch.Tensor, optimizer: Optimizer, settings: Mapping[str, Any]) -> Filling | None:
    if isinstance(optimizer, RMSprop) and settings.get("momentum") and record.config.estimate == "momentum":
        return None  # this estimate is no tensor of the state, and would be gone before the launch
    terms: list[Term] = []
    try:
        if record.config.estimate == "momentum":
            terms = first_moment(optimizer, settings, param)
        moment, by_moment = terms[0] if terms else (None, 0.0)
        decayed, by_param = terms[1] if len(terms) > 1 else (None, 0.0)
        cut, factors = cut_of(record, param), (float(by_moment), float(by_param))
    except Exception:
        return None  # fill says so
    if cut is None or not fits((tensors := (param.grad, moment, decayed)), cut, param.device):
        return None
    return cut, tensors, factors


@torch.no_grad()
def fill(optimizer: Optimizer | None, settings: Mapping[str, Any], tracked: Tracked, *, weight_up: bool = True) -> None:
    """Write the estimate into the slices of `param.grad` that were skipped since the last step.

    weight_up: those that are computed again are weighted up around theirs.
    """
    param = tracked.ref()
    if param is None or param.grad is None or tracked.partition is None:
        return
    age = tracked.state.age if weight_up else np.zeros_like(tracked.state.age)
    if ((of_groups := weights(tracked.skipped, age)) == 1.0).all():
        return
    if optimizer is not None and tracked.config.estimate == "momentum":
        try:
            terms = first_moment(optimizer, settings, param)
            _fill(param.grad, tracked, of_groups, terms, getattr(optimizer, "grad_scale", None))
            return
        except Exception:
            warning_once(
                log,
                "the state of %s is not as expected: the skipped gradients of its parameters are taken to be zeros",
                type(optimizer).__name__,
                exc_info=True,
            )
    _fill(param.grad, tracked, of_groups, [], None)


def _fill(
    grad: torch.Tensor, tracked: Tracked, of_groups: np.ndarray, terms: list[Term], scale: torch.Tensor | None
) -> None:
    """scale: set while GradScaler leaves unscaling to a fused step."""
    assert tracked.partition is not None
    dim = tracked.partition.dim
    for weight in map(float, np.unique(of_groups)):
        if weight == 1.0 or (weight > 0.0 and not terms):
            continue
        for start, length in tracked.partition.spans(of_groups == weight):
            rows = grad.narrow(dim, start, length)
            estimate = rows if weight == 0.0 else torch.empty_like(rows)
            _write(estimate, ((t.narrow(dim, start, length), factor) for t, factor in terms))
            if scale is not None and terms:
                estimate.mul_(scale.to(rows.device))
            if weight > 0.0:
                rows.copy_(torch.lerp(estimate, rows, weight))


def _write(estimate: torch.Tensor, terms: Iterable[Term]) -> None:
    first = next(iter(terms := iter(terms)), None)
    if first is None:
        estimate.zero_()
        return
    tensor, factor = first
    estimate.copy_(tensor) if factor == 1.0 else torch.mul(tensor, factor, out=estimate)
    for tensor, factor in terms:
        estimate.add_(tensor, alpha=factor)
