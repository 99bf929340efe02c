"""Which tensor it is: the one weak reference to each that is ours, so that torch can swap tensors as ever."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cacompile.torch_internals import replace_swap_tensors

_all: dict[int, Identity] = {}
"""By the tensor's id, as long as it lives."""


class Identity:
    """A tensor, held weakly. `torch.utils.swap_tensors` puts other contents into it: it stays the same one."""

    __slots__ = ("_at_end", "_key", "_ref", "data")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._key = id(tensor)
        self._at_end: list[Callable[[], None]] = []
        self.data: Any = None
        """What is known of the tensor; goes with it."""
        self.hold(tensor)

    def hold(self, tensor: torch.Tensor) -> None:
        self._ref: weakref.ref[Any] | None = weakref.ref(tensor, self._end)

    def let_go(self) -> None:
        self._ref = None

    @property
    def tensor(self) -> Any:
        """The tensor; None once it is gone."""
        return None if self._ref is None else self._ref()

    def at_end(self, callback: Callable[[], None]) -> None:
        """Call this when the tensor is gone, and before another can have its id."""
        self._at_end.append(callback)

    def end(self) -> None:
        """The tensor is taken for another one from now on, as after its contents have changed shape."""
        self._end()

    def _end(self, _: weakref.ref[Any] | None = None, everything: dict[int, Identity] = _all) -> None:
        everything.pop(self._key, None)  # its own name is gone when the interpreter ends
        self._ref = self.data = None
        for callback in self._at_end:
            callback()


def identity_of(tensor: torch.Tensor) -> Identity:
    """The identity of a tensor: one object, as long as it lives."""
    found = _all.get(id(tensor))
    if found is None:
        _replace_once()
        found = _all[id(tensor)] = Identity(tensor)
    return found


def known() -> list[Identity]:
    """All identities of live tensors."""
    return list(_all.values())


def find_identity(tensor: Any) -> Identity | None:
    return _all.get(id(tensor))


@contextmanager
def let_go_of(*tensors: torch.Tensor) -> Iterator[None]:
    """Have no weak reference to these tensors meanwhile, which the caller keeps alive."""
    held = [(identity, tensor) for tensor in tensors if (identity := find_identity(tensor)) is not None]
    for identity, _ in held:
        identity.let_go()
    try:
        yield
    finally:
        for identity, tensor in held:
            identity.hold(tensor)


def forget(tensor: Any) -> None:
    """Have no weak reference to a tensor any more: what was known of it is lost, and it is met anew."""
    if (identity := find_identity(tensor)) is not None and identity.tensor is tensor:
        identity.end()


@functools.cache
def _replace_once() -> None:
    replace_swap_tensors(let_go_of, forget)
