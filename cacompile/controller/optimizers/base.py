"""What an adapter says of an optimizer: where its mean of gradients is, and what a step is expected to win.

Expected descent per unit of learning rate is <expected gradient, expected update>, element by element: the first-order
loss decrease of a step. It is averaged where the optimizer keeps a mean of gradients; where it keeps squares at most,
the gradient of one step stands for the mean, which is noisy and too high by its variance.

Left out is what all elements of an optimizer share and what changes over a run as learning rates do: RAdam's
rectification, NAdam's schedule of momentum, Adagrad's `lr_decay`, Adafactor's 1 / sqrt(step). Weight decay that is
added to the gradient counts as part of the loss.

How far a step really moves the weights, the update ratio, is measured on the weights (`movement`) and asks no adapter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from cacompile.state.shards import local

Term = tuple[torch.Tensor, float]
"""A tensor of the parameter's shape, and what it is multiplied by."""


class Kept(NamedTuple):
    """What an optimizer keeps of one parameter."""

    param: torch.Tensor
    state: Mapping[str, Any]
    """`optimizer.state[param]`; empty before its first step."""
    settings: Mapping[str, Any]
    """Of the parameter's group: `lr`, `betas` and the like."""
    seen: int
    """Optimizer steps so far, for optimizers that do not count."""
    maximize: bool = False

    @classmethod
    def of(cls, optimizer: Optimizer, settings: Mapping[str, Any], param: torch.Tensor, seen: int = 0) -> Kept:
        """Of a DTensor, what this rank holds."""
        maximize = settings.get("maximize", getattr(optimizer, "maximize", False))
        state: Mapping[str, Any] = optimizer.state.get(param, {})
        if (mine := local(param)) is not param:
            mine = mine.detach()
            mine.grad = local(param.grad)
            param, state = mine, {name: local(value) for name, value in state.items()}
        return cls(param, state, settings, seen, bool(maximize))

    def tensor(self, name: str) -> torch.Tensor | None:
        """A state of the parameter's shape; None where there is none, or it has another form.

        Raises TypeError for one of 8 bits, which is read with a scale that only its optimizer knows.
        """
        value = self.state.get(name)
        if not isinstance(value, torch.Tensor) or value.shape != self.param.shape or not value.is_floating_point():
            return None
        if value.dtype.itemsize < 2:
            raise TypeError(f"{name} is kept in {value.dtype}, and its scale is not known")
        return value

    @property
    def step(self) -> Any:
        """Steps that the optimizer has counted, for this parameter or for its group."""
        return self.state.get("step", self.settings.get("step", self.seen))


class Statistic(NamedTuple):
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


class OptimizerAdapter:
    """How one kind of optimizer keeps what estimates and scores are read from.

    As it stands it knows nothing: skipped gradients are zeros, and groups are judged by the gradient of one step.
    Derive from it, and make it known by `cacompile.register_optimizer`.
    """

    keeps_mean = False
    """Whether there is a mean of gradients to estimate from, and to rescale computed gradients around."""
    coupled_decay = False
    """Whether weight decay is added to the gradient, unless `decoupled_weight_decay` is set; else it is apart."""

    def mean_gradient(self, kept: Kept) -> Term | None:
        """The gradient that leaves the optimizer's first moment as it is, with decay in it; None where not known."""
        return None

    def statistic(self, kept: Kept) -> Statistic | None:
        """What expected descent is read from; None where nothing is known, which leaves the gradient of this step."""
        return None

    def estimate(self, kept: Kept) -> list[Term]:
        """The gradient that a skipped slice is taken to have, as a sum of terms; empty for zeros."""
        found = self.mean_gradient(kept)
        if found is None:
            return []
        sign = -1.0 if kept.maximize else 1.0
        terms = [(found[0], sign * found[1])]
        decay = kept.settings.get("weight_decay", 0.0)
        if self.coupled_decay and decay and not kept.settings.get("decoupled_weight_decay", False):
            terms.append((kept.param, -sign * decay))
        return terms


def gradient_statistic(param: torch.Tensor) -> Statistic | None:
    """The gradient of this step, as plain SGD would follow it."""
    return None if param.grad is None else Statistic((local(param.grad),), (1.0,), averaged=False)


def descent(statistic: Statistic) -> torch.Tensor:
    """Expected descent of each element per unit of learning rate."""
    if statistic.rule is not None:
        return statistic.rule()
    if len(statistic.tensors) == 1:
        return wide(statistic.tensors[0]).square() * statistic.factors[0]
    (mean, square), (beta1, beta2, eps), step = statistic.tensors, statistic.factors, statistic.step
    rms = (wide(square) / bias(beta2, step)).sqrt_()
    return (wide(mean) / bias(beta1, step)).square_().div_(rms.add_(eps))


def bias(beta: Any, step: Any) -> Any:
    """What a mean that started at zero has seen of its weights, 1 - beta^step, as torch rounds it."""
    if type(step) is torch.Tensor and step.device.type == "cpu" and step.numel() == 1 and isinstance(beta, float):
        return _bias(beta, step.item(), step.dtype)
    return 1.0 - beta**step


@functools.lru_cache(64)
def _bias(beta: float, step: float, dtype: torch.dtype) -> float:
    """Of all parameters at once: four operations on single numbers take longer than those on a small parameter."""
    return float(1.0 - beta ** torch.tensor(step, dtype=dtype, device="cpu"))


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float32 at least: in float16 the square of a usual gradient is zero, and so is Adam's eps."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def norm(tensor: torch.Tensor) -> torch.Tensor:
    """2-norm, in float32 at least."""
    return torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))


def rms(tensor: torch.Tensor) -> torch.Tensor:
    """Root of the mean square, in float32 at least."""
    return norm(tensor) / math.sqrt(tensor.numel())
