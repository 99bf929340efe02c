"""Lion and Muon: a mean of gradients, of which the update keeps no size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .base import Kept, OptimizerAdapter, Statistic, Term, norm


@dataclass(frozen=True)
class LionAdapter(OptimizerAdapter):
    """Lion, whose mean is the one with its second beta. Estimate m; descent m * sign(m)."""

    mean: str = "exp_avg"

    keeps_mean = True

    def mean_gradient(self, kept: Kept) -> Term | None:
        mean = kept.tensor(self.mean)
        return None if mean is None else (mean, 1.0)

    def statistic(self, kept: Kept) -> Statistic | None:
        mean = kept.tensor(self.mean)
        return None if mean is None else Statistic((), rule=mean.abs)


class MuonAdapter(OptimizerAdapter):
    """Muon of torch, b.lerp_(g, 1 - mu); others of that name keep a sum. Estimate b.

    Descent b^2 sqrt(rank) / |b|, with the ratio by which torch changes the learning rate of each shape. The update is b
    with all its singular values set to about 1, so the matrix's descent is their sum; this is its upper bound, which is
    met where they are equal. The true share of row i is that of (b b^T)^(1/2), an orthogonalisation again: too dear to
    be read for choosing what to skip.
    """

    keeps_mean = True

    def mean_gradient(self, kept: Kept) -> Term | None:
        mean = kept.tensor("momentum_buffer")
        return None if mean is None else (mean, 1.0)

    def statistic(self, kept: Kept) -> Statistic | None:
        mean = kept.tensor("momentum_buffer")
        if mean is None or mean.dim() != 2:
            return None
        rows, columns = mean.shape
        how = kept.settings.get("adjust_lr_fn") or "original"
        ratios = {
            "original": math.sqrt(max(1.0, rows / columns)),
            "match_rms_adamw": 0.2 * math.sqrt(max(rows, columns)),
        }
        factor = ratios.get(how, 1.0) * math.sqrt(min(rows, columns))

        def rule() -> torch.Tensor:
            size = norm(mean).clamp(min=torch.finfo(torch.float32).tiny)
            return mean.to(size.dtype).square() * (factor / size)

        return Statistic((), rule=rule)
