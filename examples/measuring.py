"""Measures of a training step: its loss and rate, the FLOPs of a dense one, graphs compiled meanwhile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


class Graphs(NamedTuple):
    """How many graphs Dynamo captured, and Inductor compiled or took from its cache."""

    captured: int
    compiled: int
    cached: int

    @classmethod
    def so_far(cls) -> Graphs:
        """In this process."""
        inductor = counters["inductor"]
        compiled = inductor["fxgraph_cache_miss"] + inductor["fxgraph_cache_bypass"]
        return cls(counters["stats"]["unique_graphs"], compiled, inductor["fxgraph_cache_hit"])


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean in nats over all but the last dimension of `logits`."""
    return F.cross_entropy(logits.flatten(0, -2), target.flatten())


def schedule(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over the share `warmup` of the steps, then half a cosine down to a twentieth."""
    rise = max(1.0, warmup * steps)
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1.0, steps - rise)))


def step_flops(model: nn.Module, batch: Sequence[Tensor]) -> int:
    """FLOPs (two per multiply-add) of one dense forward and backward pass, counted in eager mode.

    batch: inputs, then the target. The model has gradients afterwards.
    """
    *inputs, target = batch
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the CPU's own kernel is not counted
        cross_entropy(model(*inputs), target).backward()
    return counter.get_total_flops()
