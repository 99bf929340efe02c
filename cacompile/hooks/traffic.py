"""What of gradients is sent, and whether it is worth copying that together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

LEAST = 0.125
"""Share of a buffer that must be off for it to be worth copying the rest together."""


@dataclass
class Traffic:
    """Bytes of gradients that this rank has handed to all-reduces or reduce-scatters."""

    dense: int = 0
    """What it would have been with everything computed."""
    sent: int = 0

    def __str__(self) -> str:
        share = self.sent / self.dense if self.dense else 1.0
        return f"{self.sent:.3g} of {self.dense:.3g} bytes of gradients sent ({share:.1%})"


def numel(views: Sequence[torch.Tensor]) -> int:
    """Elements of all views together."""
    return sum(math.prod(view.shape) for view in views)


def unpack(packed: torch.Tensor, views: Sequence[torch.Tensor]) -> None:
    """Write what `torch.cat` would make of the flat views, and maybe more, back to them."""
    sizes = [view.numel() for view in views]
    for view, part in zip(views, packed[: sum(sizes)].split(sizes)):
        view.copy_(part.view(view.shape))
