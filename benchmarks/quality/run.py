"""One training run of `benchmarks.quality`: a task in an arm from a seed, with what it cost and how good it became."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks.lib.timing import synchronize
from benchmarks.quality.task import Batch, Split, Task, quality
from examples.measuring import Graphs, cross_entropy, step_flops

LOOKS = (0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
"""Shares of the steps after which quality is measured too, where an arm asks for it."""


class Control:
    """What an arm does beside training; this one does nothing."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def before_step(self) -> None:
        """Called before each forward pass."""

    def after_step(self) -> None:
        """Called after the gradients of each step are gone."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train a task."""

    name: str
    title: str
    fraction: float = 1.0
    """Of the task's steps; the schedule shrinks with them."""
    batch: float = 1.0
    """Share of each batch that is trained on; as many steps."""
    rate: float = 1.0
    """Times the task's peak learning rate."""
    looks: bool = False
    """Whether quality is measured along the way too, at LOOKS."""
    backend: str | None = "inductor"
    """None: eager."""
    options: dict[str, Any] = field(default_factory=dict)
    control: Callable[[Run], Control] = Control
    optimizer: Callable[[Task, nn.Module], torch.optim.Optimizer] = lambda task, model: task.optimizer(model)
    tasks: tuple[str, ...] = ()
    """Where it applies; empty: everywhere."""
    package: str = ""
    """What must be installed for it."""
    needs_profile: bool = False
    """Whether it skips as much as convaware did from the same seed."""


class Run:
    """An arm under way, on the device that the task's models are on."""

    def __init__(self, task: Task, arm: Arm, seed: int, *, steps: int | None = None, profile: Sequence[float] = (),
                 stride: int = 1) -> None:  # fmt: skip
        """steps: of a full run, if not the task's; profile: share of dW FLOPs that convaware skipped in each step.

        stride: steps that are timed together, for a GPU works while the host goes on; a control acts before and after.
        """
        self.task, self.arm, self.seed, self.profile, self.stride = task, arm, seed, profile, stride
        self.steps = round((steps or task.steps) * arm.fraction)
        torch.manual_seed(seed)
        self.model = task.build()
        self.device = next(self.model.parameters()).device.type
        self.optimizer = arm.optimizer(task, self.model)
        self.peaks = [group["lr"] * arm.rate for group in self.optimizer.param_groups]
        self.batches = task.batches(seed)
        self.session: Any = None
        self.compiled: Callable[..., Any] = self.model
        options = dict(arm.options)
        if arm.backend == "convaware":
            import cacompile

            self.session = cacompile.session(self.model)
            options.setdefault("seed", seed)
        if arm.backend is not None:
            self.compiled = torch.compile(self.model, backend=arm.backend, options=options or None)
        self.control = arm.control(self)
        self.flops = 0.0
        self.skipped: list[float] = []
        """Share of the dW FLOPs left out, step by step."""
        self.seconds: list[float] = []
        """Of each step: of those that were timed together the mean."""
        self.stopped = False
        """Set by a control that ends the run early."""
        self._compiled: list[bool] = []

    @property
    def step_number(self) -> int:
        return len(self.seconds)

    @property
    def done(self) -> bool:
        return self.stopped or self.step_number >= self.steps

    def step(self) -> None:
        """The next `stride` training steps, timed from the forward pass to the end of the optimizer."""
        count, first = min(self.stride, self.steps - self.step_number), self.step_number
        batches = [self._batch() for _ in range(count)]
        self.control.before_step()
        before, graphs = self._spent(), Graphs.so_far()
        self.flops += sum(trainable_flops(self.model, batch) for batch in batches)
        synchronize(self.device)
        start = time.perf_counter()
        for number, batch in enumerate(batches, first):
            self._train_on(batch, self.task.rate(number, self.steps))
        synchronize(self.device)
        took = time.perf_counter() - start
        self.seconds += count * [took / count]
        self._compiled += count * [Graphs.so_far() != graphs]
        total, saved = (now - then for now, then in zip(self._spent(), before, strict=True))
        self.flops -= saved
        self.skipped += count * [saved / total if total else 0.0]
        self.control.after_step()

    def _batch(self) -> Batch:
        batch = next(self.batches)
        if self.arm.batch < 1.0:
            batch = tuple(part[: round(len(part) * self.arm.batch)] for part in batch)
        return batch

    def _train_on(self, batch: Batch, rate: float) -> None:
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * rate
        *inputs, target = batch
        with torch.autocast(self.device, torch.bfloat16) if self.task.autocast else nullcontext():
            loss = cross_entropy(self.compiled(*inputs), target)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def clean_seconds(self) -> list[float]:
        """Of each step; NaN of those during which something was compiled."""
        return [math.nan if new else took for took, new in zip(self.seconds, self._compiled, strict=True)]

    def _spent(self) -> tuple[float, float]:
        return self.session.flops if self.session is not None else (0.0, 0.0)

    def look_now(self) -> bool:
        """Whether quality is to be measured after the step that was just made."""
        return self.arm.looks and self.step_number in {round(share * self.steps) for share in LOOKS}

    def result(self, split: Split) -> dict[str, Any]:
        """quality: minus the cross-entropy; cost_seconds: steps in which something was compiled count as the median."""
        minus_loss, accuracy = quality(self.task, self.model, split)
        clean = [took for took in self.clean_seconds if not math.isnan(took)]
        seconds = sum(clean) + (self.step_number - len(clean)) * statistics.median(clean or self.seconds)
        return {
            "steps": self.steps, "steps_taken": self.step_number, "cost_flops": self.flops, "cost_seconds": seconds,
            "quality": minus_loss, "accuracy": accuracy,
            "skipped_share": statistics.mean(self.skipped) if self.arm.backend else None,
        }  # fmt: skip


_counted: dict[Any, float] = {}


def trainable_flops(model: nn.Module, batch: Batch) -> float:
    """FLOPs of a dense forward and backward pass with what is trainable now; counted once for each such set."""
    params = [(param.shape, param.requires_grad) for param in model.parameters()]
    key = type(model), tuple(params), tuple(part.shape for part in batch)
    if key not in _counted:
        _counted[key] = float(step_flops(copy.deepcopy(model), batch))
    return _counted[key]


def train(
    runs: Sequence[Run],
    chunk: int = 5,
    tick: Callable[[], object] = lambda: None,
    look: Callable[[Run], object] = lambda run: None,
) -> None:
    """Step all runs to their ends, taking turns every `chunk` of their strides; who goes first alternates.

    look: called after the steps of a run at which its quality is to be measured.
    """
    turn = 0
    while not all(run.done for run in runs):
        for run in runs if turn % 2 == 0 else reversed(runs):
            for _ in range(chunk):
                if not run.done:
                    run.step()
                    tick()
                    if run.look_now() and not run.done:
                        look(run)
        turn += 1
