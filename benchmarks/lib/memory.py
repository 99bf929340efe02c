"""What a step allocates on a CPU, counted from every allocation that torch's profiler sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

MARK = "forward is over"


class Memory(NamedTuple):
    """Bytes beyond what lived before the step."""

    saved: int
    """Alive between forward and backward: activations that are saved, and the loss."""
    peak: int
    """The most that was alive at a time in forward and backward, gradients among it."""


def memory_of(forward: Callable[[], Tensor], backward: Callable[[Tensor], object]) -> Memory:
    """Of one forward and backward, by torch's CPU allocator: the same in every run, however busy the machine."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss = forward()
        with torch.profiler.record_function(MARK):
            pass
        backward(loss)
    events = profile.profiler.kineto_results.events()
    mark = next(event.start_ns() for event in events if event.name() == MARK)
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    alive = peak = saved = 0
    for when, change in changes:
        alive += change
        peak = max(peak, alive)
        saved = alive if when < mark else saved
    return Memory(saved, peak)
