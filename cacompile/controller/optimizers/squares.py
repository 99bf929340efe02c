"""Adagrad and Adafactor: squares alone, which do not tell which way to go, so skipped gradients are zeros."""

from __future__ import annotations

import torch

from .base import Kept, OptimizerAdapter, Statistic, rms, wide


class AdagradAdapter(OptimizerAdapter):
    """Adagrad. Descent g^2 / (sqrt(sum) + eps), g being the gradient of one step."""

    coupled_decay = True

    def statistic(self, kept: Kept) -> Statistic | None:
        gradient, total = kept.param.grad, kept.tensor("sum")
        if gradient is None or total is None:
            return None
        return Statistic(
            (), averaged=False, rule=lambda: wide(gradient).square() / (wide(total).sqrt() + kept.settings["eps"])
        )


class AdafactorAdapter(OptimizerAdapter):
    """Adafactor of torch. Descent g * u max(eps2, rms(param)) / max(1, rms(u) / d), where u = g / sqrt(variance).

    Matrices keep the variance as a product of rows and columns. Skipped slices, zeros in u, make its rms too small.
    """

    def statistic(self, kept: Kept) -> Statistic | None:
        param, state, gradient, (small, least) = kept.param, kept.state, kept.param.grad, kept.settings["eps"]
        if gradient is None or not ("row_var" in state or "variance" in state):
            return None
        small = torch.finfo(param.dtype).eps if small is None else small

        def rule() -> torch.Tensor:
            if "row_var" in state:
                row = state["row_var"]
                variance = (row @ state["col_var"]).div_(row.mean(dim=-2, keepdim=True).clamp_(min=small))
            else:
                variance = state["variance"]
            update = wide(variance).clamp(min=small * small).rsqrt_() * gradient
            clipped = (rms(update) / kept.settings["d"]).clamp(min=1.0)
            return gradient * update * (rms(param).clamp(min=least) / clipped)

        return Statistic((), averaged=False, rule=rule)
