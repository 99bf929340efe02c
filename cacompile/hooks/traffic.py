"""What of gradients is sent: which slices, packed together, and how many bytes that is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from cacompile.state.params import ParamState

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


def slices_on(state: ParamState, tensor: torch.Tensor, within: tuple[int, int] | None = None) -> Iterator[torch.Tensor]:
    """Views of what is on, on all ranks, of a parted parameter's gradient. within: its rows, if not all."""
    assert state.partition is not None
    for start, length in state.partition.spans(state.column("agreed") & ~state.frozen_blocks, within):
        yield tensor.narrow(state.partition.dim, start, length)


def pack(views: Sequence[torch.Tensor], packed: torch.Tensor) -> None:
    """Write the views one after the other to the beginning of a flat tensor."""
    if views:
        torch.cat([view.reshape(-1) for view in views], out=packed[: numel(views)])


def unpack(packed: torch.Tensor, views: Sequence[torch.Tensor]) -> None:
    """Write the beginning of a flat tensor back to the views that `pack` would have it from."""
    sizes = [view.numel() for view in views]
    for view, part in zip(views, packed[: sum(sizes)].split(sizes)):
        view.copy_(part.view(view.shape))
