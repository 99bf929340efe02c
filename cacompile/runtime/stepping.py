"""Follows every optimizer step without being called: estimates before it, the next mask after it."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from cacompile.config import Config

from .clipping import follow_clipping
from .scope import Scope
from .tracked import Tracked, registry


class Scopes:
    """The scopes of one owner of parameters, made anew when its parameters or their groups have changed."""

    def __init__(self) -> None:
        self._key: tuple[int, list[int]] | None = None
        self._scopes: list[Scope] = []
        self._left: weakref.WeakSet[Tracked] = weakref.WeakSet()
        """Records that the owner, an optimizer, leaves to another one within it."""
        self._begun: list[tuple[Tracked, int]] | None = None
        """The records and their steps when the owner's step began, until it is done."""

    def of(self, params: list[Any]) -> list[Scope]:
        key = (registry.generation, [id(param) for param in params])
        if key != self._key or not all(scope.valid for scope in self._scopes):
            self._key = key
            self._scopes = make_scopes(
                record for record in map(registry.find, params) if record is not None and record not in self._left
            )
        return self._scopes

    def begin(self, scopes: list[Scope]) -> None:
        """The owner's step begins with these scopes."""
        self._begun = [(record, record.step) for scope in scopes for record in scope.tracked]

    def end(self) -> bool:
        """The owner's step is done: whether some of its parameters are its own to advance.

        What another optimizer has advanced since `begin` is left to that one from now on: Lookahead, SAM and the like
        hold an optimizer that does the work. False too at the end of a step around this one by the same optimizer, as
        where `super().step()` is hooked as well.
        """
        begun, self._begun = self._begun, None
        if begun is None:
            return False
        if stepped := [record for record, step in begun if record.step != step]:
            self._left.update(stepped)
            self._key = None
        return len(stepped) < len(begun)


def make_scopes(tracked: Iterable[Tracked]) -> list[Scope]:
    """One scope for each Config among the parameters that have groups."""
    by_config: dict[Config, list[Tracked]] = {}
    for record in dict.fromkeys(tracked):
        if record.groups:
            by_config.setdefault(record.config, []).append(record)
    return [Scope(records) for records in by_config.values()]


_by_optimizer: weakref.WeakKeyDictionary[Optimizer, Scopes] = weakref.WeakKeyDictionary()


def scopes_of(optimizer: Optimizer) -> list[Scope]:
    """The scopes that an optimizer's steps advance; empty if it steps no parameter of a convaware model itself."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return _owned_by(optimizer).of(params)


def _owned_by(optimizer: Optimizer) -> Scopes:
    return _by_optimizer.setdefault(optimizer, Scopes())


@torch._dynamo.disable
def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    scopes = scopes_of(optimizer)
    _owned_by(optimizer).begin(scopes)
    if not scopes:
        return None
    for scope in scopes:
        scope.look()

    def fill() -> None:
        for scope in scopes:
            scope.fill(optimizer)

    # with a closure the gradients appear inside the step, so the estimates must come right after it
    if callable(kwargs.get("closure")):
        return args, {**kwargs, "closure": _then(kwargs["closure"], fill)}
    if len(args) > 1 and callable(args[1]):
        return (args[0], _then(args[1], fill), *args[2:]), kwargs
    fill()
    return None


@torch._dynamo.disable
def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if _owned_by(optimizer).end():
        for scope in scopes_of(optimizer):
            scope.advance(optimizer)


def _then(closure: Callable[[], Any], after: Callable[[], None]) -> Callable[[], Any]:
    @functools.wraps(closure)
    def both() -> Any:
        loss = closure()
        after()
        return loss

    return both


@functools.cache
def follow_optimizers() -> None:
    """Install the two hooks, once; they act only for optimizers that hold parameters of a convaware model.

    Clipping, which comes before the step, is followed along with them.
    """
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)
    follow_clipping()
