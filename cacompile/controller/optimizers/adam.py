"""Adam's family: m = b1 m + (1 - b1) g, and a mean of squares that updates are divided by the root of."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .base import Kept, OptimizerAdapter, Statistic, Term, norm, wide


@dataclass(frozen=True)
class AdamAdapter(OptimizerAdapter):
    """Adam, AdamW, NAdam, RAdam. Estimate m; descent m^2 / (rms + eps), m and rms without their bias."""

    mean: str = "exp_avg"
    squares: tuple[str, ...] = ("max_exp_avg_sq", "exp_avg_sq")
    """Names of the mean of squares, the first that is there counts."""
    coupled_decay: bool = False
    biased: bool = True
    """Whether both means start at zero and are corrected for it."""

    keeps_mean = True

    def mean_gradient(self, kept: Kept) -> Term | None:
        mean = kept.tensor(self.mean)
        return None if mean is None else (mean, 1.0)

    def statistic(self, kept: Kept) -> Statistic | None:
        mean, square = kept.tensor(self.mean), self.square(kept)
        if mean is None or square is None:
            return None
        beta1, beta2, *_ = kept.settings.get("betas", (0.9, 0.999))
        step = kept.step if self.biased else math.inf
        return Statistic((mean, square), (beta1, beta2, kept.settings.get("eps", 1e-8)), step)

    def square(self, kept: Kept) -> torch.Tensor | None:
        """The mean of squares."""
        return next((found for name in self.squares if (found := kept.tensor(name)) is not None), None)


class AdamaxAdapter(OptimizerAdapter):
    """Adamax. Estimate m; descent m^2 / u, u being the greatest gradient of late; eps is in u."""

    keeps_mean = coupled_decay = True

    def mean_gradient(self, kept: Kept) -> Term | None:
        mean = kept.tensor("exp_avg")
        return None if mean is None else (mean, 1.0)

    def statistic(self, kept: Kept) -> Statistic | None:
        mean, greatest = kept.tensor("exp_avg"), kept.tensor("exp_inf")
        if mean is None or greatest is None:
            return None
        bias = 1.0 - kept.settings["betas"][0] ** kept.step
        return Statistic((), rule=lambda: (wide(mean) / bias).square() / greatest)


class LambAdapter(AdamAdapter):
    """LAMB of pytorch_optimizer. Descent m^2 / (rms + eps) of the plain means, times |w| / |update| of the parameter.

    Without `grad_averaging` its m is a sum, b1 m + g: the mean is (1 - b1) m.
    """

    def mean_gradient(self, kept: Kept) -> Term | None:
        mean = kept.tensor(self.mean)
        return None if mean is None else (mean, self._averages(kept))

    def statistic(self, kept: Kept) -> Statistic | None:
        mean, square, factor = kept.tensor(self.mean), self.square(kept), self._averages(kept)
        if mean is None or square is None:
            return None
        bias = 1.0 - kept.settings["betas"][0] ** kept.step

        def rule() -> torch.Tensor:
            update = wide(mean) / (wide(square).sqrt() + kept.settings["eps"])
            trust = kept.state.get("trust_ratio", norm(kept.param).clamp(max=10.0) / norm(update))
            return mean * update * (factor / bias**2) * (1.0 if kept.settings.get("adam") else trust)

        return Statistic((), rule=rule)

    @staticmethod
    def _averages(kept: Kept) -> float:
        return 1.0 if kept.settings.get("grad_averaging", True) else 1.0 - kept.settings["betas"][0]


class AdaBoundAdapter(AdamAdapter):
    """AdaBound. Estimate m; descent m^2 / (rms + eps), the divisor held within bounds that close in on SGD's.

    The bounds follow the learning rate as at its start; a schedule since then moves them, for all elements alike.
    """

    def statistic(self, kept: Kept) -> Statistic | None:
        mean, square, settings = kept.tensor(self.mean), self.square(kept), kept.settings
        if mean is None or square is None:
            return None
        (beta1, beta2), step, final = settings["betas"], kept.step, settings["final_lr"] / settings["lr"]
        bounds = (
            final * (1.0 - 1.0 / (settings["gamma"] * step + 1.0)),
            final * (1.0 + 1.0 / (settings["gamma"] * step)),
        )

        def rule() -> torch.Tensor:
            bias1, bias2 = 1.0 - beta1**step, 1.0 - beta2**step
            rate = (math.sqrt(bias2) / bias1 / (wide(square).sqrt() + settings["eps"])).clamp(*bounds)
            return wide(mean).square() * rate / bias1

        return Statistic((), rule=rule)


class AdanAdapter(AdamAdapter):
    """Adan. Estimate m; descent m (m + b2 d) / (rms + eps), d being the mean difference of successive gradients."""

    def statistic(self, kept: Kept) -> Statistic | None:
        mean, square, differences = kept.tensor(self.mean), self.square(kept), kept.tensor("exp_avg_diff")
        if mean is None or square is None or differences is None:
            return None
        (beta1, beta2, beta3), step = kept.settings["betas"], kept.step

        def rule() -> torch.Tensor:
            expected = wide(mean) / (1.0 - beta1**step)
            update = expected + beta2 / (1.0 - beta2**step) * differences
            return expected * update / ((wide(square) / (1.0 - beta3**step)).sqrt() + kept.settings["eps"])

        return Statistic((), rule=rule)


class AdamMiniAdapter(AdamAdapter):
    """Adam-mini, also that of pytorch_optimizer. Estimate m; descent m^2 / (rms + eps).

    The rms is that of a whole parameter or of each element.

    Of parameters that it keeps by heads, in another shape, nothing is known.
    """

    def statistic(self, kept: Kept) -> Statistic | None:
        mean = kept.tensor(self.mean)
        square = next((kept.state[name] for name in ("v_mean", "vmean", "v") if name in kept.state), None)
        if mean is None or not isinstance(square, torch.Tensor) or square.numel() not in (1, mean.numel()):
            return None
        (beta1, beta2), step, eps = kept.settings["betas"], kept.step, kept.settings["eps"]
        spread = square.expand_as(mean) if square.numel() == 1 else square
        return Statistic((mean, spread), (beta1, beta2, eps), step)
