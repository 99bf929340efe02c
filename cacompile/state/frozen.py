"""Frozen parameters of the process, whole or in part, and what keeps a gradient None."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from .pins import Pin
    from .table import BlockTable

_frozen: weakref.WeakSet[Freezable] = weakref.WeakSet()
_newest = 0


def newest_freeze() -> int:
    """A number that grows whenever a parameter is frozen or thawed."""
    return _newest


def any_frozen() -> bool:
    """Whether anything is frozen, if only a group."""
    return bool(_frozen)


def note_frozen(state: Freezable, frozen: bool) -> None:
    """A parameter has been frozen or thawed. frozen: whether anything of it is now."""
    global _newest
    (_frozen.add if frozen else _frozen.discard)(state)
    _newest += 1


class Freezable:
    """The part of a parameter's state that says what of it is frozen, since which step."""

    if TYPE_CHECKING:
        table: BlockTable
        pin: Pin | None

        @property
        def param(self) -> torch.nn.Parameter | None: ...
        @property
        def blocks(self) -> int: ...
        @property
        def rows(self) -> slice: ...
        @property
        def on(self) -> np.ndarray: ...
        @property
        def skipped(self) -> np.ndarray: ...
        @property
        def age(self) -> np.ndarray: ...
        def column(self, name: str) -> np.ndarray: ...
        def apply_pin(self) -> None: ...

    def __init__(self) -> None:
        self.frozen: int | None = None
        """The optimizer step after which it was frozen as a whole; None: it was not. Blocks have a column for it."""
        self.settled = False
        """Whether it was said if it is frozen: by a session, a saved state, or the options of its first graph."""
        self._no_gradient: NoGradient | None = None

    @property
    def is_frozen(self) -> bool:
        """Whether nothing of it is trained: its gradient is None."""
        return self.frozen is not None or bool(self.blocks and self.frozen_blocks.all())

    @property
    def frozen_blocks(self) -> np.ndarray:
        """bool [blocks]: those that are not trained."""
        return (self.column("frozen") >= 0) | (self.frozen is not None)

    def freeze(self, since: int | None) -> None:
        """Freeze all of it, from the step `since` on; None: thaw it, but for blocks that are frozen themselves."""
        self.frozen, self.settled = since, True
        self._hold_frozen()

    def freeze_blocks(self, since: np.ndarray) -> None:
        """Freeze blocks from these steps on, int64 [blocks]; -1: thaw them."""
        if not np.array_equal(since, self.column("frozen")):
            before = self.on | (self.column("frozen") >= 0)  # thawed, they are computed until a mask is drawn
            self.column("frozen")[:] = since
            self.table.set_on(self.rows, before)
            if self.pin is not None:
                self.apply_pin()
        self.settled = True
        self._hold_frozen()

    def _hold_frozen(self) -> None:
        """Let what is frozen take effect. What was missed counts no more: back again, it goes on from there."""
        if self.blocks:
            off = self.frozen_blocks
            self.skipped[off], self.age[off] = False, 0
        param, is_frozen = self.param, self.is_frozen
        note_frozen(self, is_frozen or bool(self.blocks and self.frozen_blocks.any()))
        if is_frozen is (self._no_gradient is not None):
            return
        if self._no_gradient is not None:
            self._no_gradient.end()
        self._no_gradient = NoGradient(param) if is_frozen and param is not None else None


class NoGradient:
    """Keeps a parameter's gradient None, wherever one is made for it: outside of our graphs too."""

    def __init__(self, param: torch.nn.Parameter) -> None:
        param.grad = None
        # not `requires_grad`, by which Dynamo guards; this hook it does not look at
        self._hook: Any = _hooked(param)

    def end(self) -> None:
        if self._hook is not None:
            self._hook.remove()


def _hooked(param: torch.nn.Parameter) -> Any:
    """The hook's handle; None for what never has a gradient.

    torch lets only what is trained have one, but a user may have the parameter trained later.
    """
    trained = param.requires_grad
    try:
        return param.requires_grad_(True).register_post_accumulate_grad_hook(_drop)
    except RuntimeError:  # of integers, or of inference mode
        return None
    finally:
        param.requires_grad_(trained)


def _drop(param: torch.Tensor) -> None:
    param.grad = None
