"""Frozen parameters of the process, whole or in part, and what keeps a gradient None."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .params import ParamState

_frozen: weakref.WeakSet[ParamState] = weakref.WeakSet()
_newest = 0


def newest_freeze() -> int:
    """A number that grows whenever a parameter is frozen or thawed."""
    return _newest


def any_frozen() -> bool:
    """Whether anything is frozen, if only a group."""
    return bool(_frozen)


def note_frozen(state: ParamState, frozen: bool) -> None:
    """A parameter has been frozen or thawed. frozen: whether anything of it is now."""
    global _newest
    (_frozen.add if frozen else _frozen.discard)(state)
    _newest += 1


class NoGradient:
    """Keeps a parameter's gradient None, wherever one is made for it: outside of our graphs too."""

    def __init__(self, param: torch.nn.Parameter) -> None:
        param.grad = None
        # not `requires_grad`, by which Dynamo guards; this hook it does not look at
        self._hook: Any = param.register_post_accumulate_grad_hook(_drop) if param.requires_grad else None

    def end(self) -> None:
        if self._hook is not None:
            self._hook.remove()


def _drop(param: torch.Tensor) -> None:
    param.grad = None
