"""A count of each optimizer's steps, from when the backend is first asked for: the same on all ranks of a job.

When a rank first meets a compiled graph depends on its batches; how often its optimizers have stepped does not.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

_steps: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()


def steps_of(optimizer: Optimizer) -> int:
    """Its steps so far; one that is hooked twice, as where `super().step()` is hooked as well, counts double."""
    return _steps.get(optimizer, 0)


@functools.cache
def count_steps() -> None:
    """Count from now on."""
    register_optimizer_step_post_hook(_count)


def _count(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _steps[optimizer] = _steps.get(optimizer, 0) + 1
