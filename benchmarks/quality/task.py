"""What a task of `benchmarks.quality` is, and how good a model has become at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.measuring import schedule

Split = Literal["valid", "test"]
Batch = tuple[Tensor, ...]
"""Inputs of the model, then the target."""

WARMUP = 0.1
"""Share of the steps in which the learning rate rises."""


def decaying(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine: the share of the peak learning rate."""
    return schedule(step, steps, WARMUP)


def constant(step: int, steps: int) -> float:
    """Linear warm-up as in `decaying`, then the peak rate to the end."""
    return min(1.0, (step + 1) / (WARMUP * steps + 1))


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all arms of one task share."""

    name: str
    title: str
    steps: int
    goal: Literal["fine-tuning", "from scratch", "early", ""]
    """Which of the goals it is held against; early: it ends long before anything has converged."""
    build: Callable[[], nn.Module]
    tiny: Callable[[], nn.Module]
    """A much smaller model of the same kind, to see that all runs."""
    batches: Callable[[int], Iterator[Batch]]
    """seed -> an endless stream."""
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    held_out: Callable[[Split], Iterator[Batch]]
    rate: Callable[[int, int], float] = decaying
    """(step, steps) -> share of the peak learning rate."""
    autocast: bool = False
    """Whether it is trained under bfloat16 autocast."""


def quality(task: Task, model: nn.Module, split: Split) -> tuple[float, float]:
    """(minus the mean cross-entropy in nats, accuracy) of an uncompiled model on data that it was not trained on."""
    model.eval()
    lost, right, count = 0.0, 0, 0
    with torch.no_grad():
        for *inputs, target in task.held_out(split):
            logits = model(*inputs).flatten(0, -2)
            lost += float(F.cross_entropy(logits, target.flatten(), reduction="sum"))
            right += int((logits.argmax(-1) == target.flatten()).sum())
            count += target.numel()
    model.train()
    return -lost / count, right / count
