"""SGD and RMSprop: with momentum they keep a sum of gradients, or of what became of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .base import Kept, OptimizerAdapter, Statistic, Term, wide


class SGDAdapter(OptimizerAdapter):
    """SGD keeps b = mu b + (1 - dampening) g: the estimate is (1 - mu) / (1 - dampening) b.

    Descent: its product with b.

    The update is the buffer, with nesterov too once it has settled. Without momentum nothing is known.
    """

    keeps_mean = coupled_decay = True

    def mean_gradient(self, kept: Kept) -> Term | None:
        # what an earlier momentum has left is not read any more
        buffer = kept.tensor("momentum_buffer") if kept.settings["momentum"] else None
        return None if buffer is None else (buffer, mean_of_sum(kept.settings))

    def statistic(self, kept: Kept) -> Statistic | None:
        found = self.mean_gradient(kept)
        return None if found is None else Statistic((found[0],), (found[1],))


class RMSpropAdapter(OptimizerAdapter):
    """RMSprop with momentum keeps b = mu b + g / rms: the estimate is (1 - mu) rms b, nearly.

    Descent: its product with b.

    The step changes the rms that it divides by: where the mean is below it, b grows by up to (1 - mu) (1 - alpha) / 2
    of itself, 0.05 % if mu is 0.9. Without momentum the gradient g of one step is all there is: g^2 / rms, with g's
    mean if centered. That mean is no estimate: as a gradient it takes its own variance, which updates are divided by,
    to zero.
    """

    keeps_mean = coupled_decay = True

    def mean_gradient(self, kept: Kept) -> Term | None:
        buffer, square = kept.tensor("momentum_buffer"), kept.tensor("square_avg")
        if not kept.settings["momentum"] > 0 or buffer is None or square is None:
            return None
        return buffer * rms_of(kept.state, kept.settings), 1.0 - kept.settings["momentum"]

    def statistic(self, kept: Kept) -> Statistic | None:
        state, settings = kept.state, kept.settings
        if kept.tensor("square_avg") is None:
            return None
        buffer = kept.tensor("momentum_buffer") if settings["momentum"] > 0 else None
        if buffer is not None:
            momentum = settings["momentum"]
            return Statistic((), rule=lambda: wide(buffer).square() * rms_of(state, settings) * (1.0 - momentum))
        # zeros stand in for what is skipped and pull this mean down, so it tells of the computed groups only
        gradient = state["grad_avg"] if settings["centered"] else kept.param.grad
        if gradient is None:
            return None
        return Statistic((), averaged=False, rule=lambda: wide(gradient).square() / rms_of(state, settings))


def mean_of_sum(settings: Mapping[str, Any]) -> float:
    """What SGD's buffer is multiplied by to give the mean gradient; 1 where it takes no gradients up any more."""
    if settings["dampening"] == 1:
        return 1.0
    return (1.0 - settings["momentum"]) / (1.0 - settings["dampening"])


def rms_of(state: Mapping[str, Any], settings: Mapping[str, Any]) -> torch.Tensor:
    """What RMSprop divides gradients by: the root of its mean square, or of its variance if centered, plus eps."""
    square = wide(state["square_avg"])
    if settings["centered"]:
        mean = wide(state["grad_avg"])
        square = square.addcmul(mean, mean, value=-1).clamp_(min=0.0)
    return square.sqrt().add_(settings["eps"])
