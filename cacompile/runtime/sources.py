"""What a parameter's expected descent is read from: the statistics that its optimizer keeps, or one gradient.

Expected descent per unit of learning rate is <expected gradient, expected update>, element by element: the first-order
loss decrease of a step. It is averaged where the optimizer keeps a mean of gradients; where it keeps squares at most,
the gradient of one step stands for the mean, which is noisy and too high by its variance.

Left out is what all elements of an optimizer share and what changes over a run as learning rates do: RAdam's
rectification, NAdam's schedule of momentum, Adagrad's `lr_decay`, Adafactor's 1 / sqrt(step). Weight decay that is
added to the gradient counts as part of the loss.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.optim import SGD, Adafactor, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from .estimate import mean_of_sum, rms_of


class Source(NamedTuple):
    """What a parameter's expected descent is read from. Kernels know (mean, mean square) and one tensor's square."""

    tensors: tuple[torch.Tensor, ...]
    """(mean, mean square) of Adam's family, or one: a mean of gradients, or a gradient. Empty where `rule` reads it."""
    factors: tuple[Any, ...] = ()
    """(beta1, beta2, eps), or what the square of the one tensor is multiplied by."""
    step: Any = None
    """Steps that Adam has averaged over: a tensor where it counts on the device, which is not waited for."""
    averaged: bool = True
    """Whether any step may read it; False if it tells of the groups that this step computed."""
    rule: Callable[[], torch.Tensor] | None = None
    """Gives the expected descent of each element, where it is neither of the two above."""


Settings = Mapping[str, Any]
State = Mapping[str, Any]
Reader = Callable[[State, Settings, torch.Tensor, int], Source | None]


def source_of(
    optimizer: Optimizer | None, settings: Mapping[str, Any], param: torch.Tensor, seen: int
) -> Source | None:
    """What the optimizer keeps of the parameter; None where nothing is known, which leaves `gradient_of`.

    settings: of the parameter's group; seen: optimizer steps so far, for optimizers that do not count.
    """
    kind: Any = type(optimizer)
    read = None if optimizer is None else _reader_of(kind)
    return None if optimizer is None or read is None else read(optimizer.state.get(param, {}), settings, param, seen)


def gradient_of(param: torch.Tensor) -> Source | None:
    """The gradient of this step, as plain SGD would follow it."""
    return None if param.grad is None else Source((param.grad,), (1.0,), averaged=False)


def descent(source: Source) -> torch.Tensor:
    """Expected descent of each element per unit of learning rate."""
    if source.rule is not None:
        return source.rule()
    if len(source.tensors) == 1:
        return source.tensors[0].square() * source.factors[0]
    (mean, square), (beta1, beta2, eps), step = source.tensors, source.factors, source.step
    rms = (square / (1.0 - beta2**step)).sqrt()
    return (mean / (1.0 - beta1**step)).square() / (rms + eps)


def _adam(state: State, settings: Settings, param: torch.Tensor, seen: int) -> Source | None:
    """m^2 / (rms + eps), m and rms without their bias."""
    mean, square = state.get("exp_avg"), state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
    if mean is None or square is None or not _like(param, mean, square):
        return None
    betas, eps = settings.get("betas", (0.9, 0.999)), settings.get("eps", 1e-8)
    return Source((mean, square), (*betas, eps), state.get("step", seen))


def _adamax(state: State, settings: Settings, param: torch.Tensor, seen: int) -> Source | None:
    """m^2 / u, u being the greatest gradient of late; eps is in u."""
    mean, greatest = state.get("exp_avg"), state.get("exp_inf")
    if mean is None or greatest is None or not _like(param, mean, greatest):
        return None
    bias = 1.0 - settings["betas"][0] ** state["step"]
    return Source((), rule=lambda: (mean / bias).square() / greatest)


def _sgd(state: State, settings: Settings, param: torch.Tensor, seen: int) -> Source | None:
    """b * (1 - mu) / (1 - dampening) b: the update is the buffer, with nesterov too once it has settled."""
    buffer = state.get("momentum_buffer")
    if not settings["momentum"] or buffer is None or not _like(param, buffer):
        return None
    return Source((buffer,), (mean_of_sum(settings),))


def _lion(state: State, settings: Settings, param: torch.Tensor, seen: int) -> Source | None:
    """m * sign(m)."""
    mean = state.get("exp_avg")
    return Source((), rule=mean.abs) if mean is not None and _like(param, mean) else None


def _muon(state: State, settings: Settings, param: torch.Tensor, seen: int) -> Source | None:
    """m^2 sqrt(rank) / |m|, with the ratio by which torch changes the learning rate of each shape.

    The update is m with all its singular values set to about 1, so the matrix's descent is their sum; this is its upper
    bound, which is met where they are equal. The true share of row i is that of (m m^T)^(1/2), an orthogonalisation
    again: too dear to be read for choosing what to skip.
    """
    mean = state.get("momentum_buffer")
    if mean is None or mean.dim() != 2 or not _like(param, mean):
        return None
    rows, columns = mean.shape
    how = settings.get("adjust_lr_fn") or "original"
    ratios = {"original": math.sqrt(max(1.0, rows / columns)), "match_rms_adamw": 0.2 * math.sqrt(max(rows, columns))}
    factor = ratios.get(how, 1.0) * math.sqrt(min(rows, columns))

    def rule() -> torch.Tensor:
        norm = _norm(mean).clamp(min=torch.finfo(torch.float32).tiny)
        return mean.to(norm.dtype).square() * (factor / norm)

    return Source((), rule=rule)


def _rmsprop(state: State, settings: Settings, param: torch.Tensor, seen: int) -> Source | None:
    """With momentum b * (1 - mu) rms b. Without, the gradient g of one step: g^2 / rms, with g's mean if centered."""
    if not _like(param, state.get("square_avg")):
        return None
    buffer, momentum = state.get("momentum_buffer"), settings["momentum"]
    if momentum > 0 and buffer is not None:
        return Source((), rule=lambda: buffer.square() * rms_of(state, settings) * (1.0 - momentum))
    # zeros stand in for what is skipped and pull this mean down, so it tells of the computed groups only
    gradient = state["grad_avg"] if settings["centered"] else param.grad
    if gradient is None:
        return None
    return Source((), averaged=False, rule=lambda: gradient.square() / rms_of(state, settings))


def _adagrad(state: State, settings: Settings, param: torch.Tensor, seen: int) -> Source | None:
    """g^2 / (sqrt(sum) + eps), g being the gradient of one step."""
    gradient, total = param.grad, state.get("sum")
    if gradient is None or total is None or not _like(param, total):
        return None
    return Source((), averaged=False, rule=lambda: gradient.square() / (total.sqrt() + settings["eps"]))


def _adafactor(state: State, settings: Settings, param: torch.Tensor, seen: int) -> Source | None:
    """g * u max(eps2, rms(param)) / max(1, rms(u) / d), where u = g / sqrt(variance) and g the gradient of one step.

    Matrices keep the variance as a product of rows and columns. Skipped slices, zeros in u, make its rms too small.
    """
    gradient, (small, least) = param.grad, settings["eps"]
    if gradient is None or not ("row_var" in state or "variance" in state):
        return None
    small = torch.finfo(param.dtype).eps if small is None else small

    def rule() -> torch.Tensor:
        if "row_var" in state:
            row = state["row_var"]
            variance = (row @ state["col_var"]).div_(row.mean(dim=-2, keepdim=True).clamp_(min=small))
        else:
            variance = state["variance"]
        update = variance.clamp(min=small * small).rsqrt_() * gradient
        return gradient * update * (_rms(param).clamp(min=least) / (_rms(update) / settings["d"]).clamp(min=1.0))

    return Source((), averaged=False, rule=rule)


def _norm(tensor: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))


def _rms(tensor: torch.Tensor) -> torch.Tensor:
    return _norm(tensor) / math.sqrt(tensor.numel())


def _like(param: torch.Tensor, *tensors: Any) -> bool:
    return all(isinstance(tensor, torch.Tensor) and tensor.shape == param.shape for tensor in tensors)


READERS: tuple[tuple[tuple[type, ...], Reader], ...] = (
    ((Adam, AdamW, NAdam, RAdam), _adam),
    ((Adamax,), _adamax),
    ((SGD,), _sgd),
    ((RMSprop,), _rmsprop),
    ((Adagrad,), _adagrad),
    ((Adafactor,), _adafactor),
    # not in every torch
    ((torch.optim.Muon,) if hasattr(torch.optim, "Muon") else (), _muon),
)

NAMED: dict[str, Reader] = {"AdamW": _adam, "Lion": _lion}
"""Classes outside torch, by name: AdamW of transformers, Lion (update: the sign of its mean)."""


@functools.cache  # asked for every parameter
def _reader_of(optimizer_type: type) -> Reader | None:
    for classes, read in READERS:
        if issubclass(optimizer_type, classes):
            return read
    return NAMED.get(optimizer_type.__name__)
