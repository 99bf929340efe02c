"""Follows every optimizer step without being called: estimates before it, the next mask after it."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from cacompile.config import Config
from cacompile.controller.controller import Controller
from cacompile.state.params import ParamState, registry
from cacompile.state.table import newest_structure

from .clipping import follow_clipping
from .put_back import put_back, take

_moments = itertools.count(1)
"""Beginnings and ends of steps, in their order."""


class Controllers:
    """The controllers of one owner of parameters, made anew when its parameters or their groups have changed."""

    def __init__(self) -> None:
        self._key: tuple[int, list[int]] | None = None
        self._controllers: list[Controller] = []
        self._left: weakref.WeakSet[ParamState] = weakref.WeakSet()
        """Parameters that the owner, an optimizer, leaves to another one within it."""
        self._begun = 0
        """When the owner's last step began, in the count of `_moments`."""
        self._done = False
        """Whether that step is done."""

    def of(self, params: list[Any]) -> list[Controller]:
        ids = [id(param) for param in params]
        if self._key != (newest_structure(), ids):
            states = map(registry.find, params)
            self._controllers = make_controllers(s for s in states if s is not None and s not in self._left)
            self._key = newest_structure(), ids  # making them may have joined tables
        return self._controllers

    def begin(self) -> None:
        """The owner's step begins. The first one may end without: our hooks may come with what is called inside."""
        self._begun, self._done = next(_moments), False

    def advance(self, optimizer: Optimizer, params: list[Any]) -> None:
        """The owner's step is done, once however often it is hooked, as where `super().step()` is hooked as well.

        What another optimizer has advanced since `begin` is left to that one from now on: Lookahead, SAM and the like
        hold an optimizer that does the work.
        """
        if self._done:
            return
        self._done = True
        controllers = self.of(params)
        if stepped := [r for controller in controllers for r in controller.params if r.stepped > self._begun]:
            self._left.update(stepped)
            self._key = None
            controllers = self.of(params)
        now = next(_moments)
        for controller in controllers:
            controller.advance(optimizer)
            for param in controller.params:
                param.stepped = now


def make_controllers(params: Iterable[ParamState]) -> list[Controller]:
    """One controller for each Config among the parameters that have groups."""
    by_config: dict[Config, list[ParamState]] = {}
    for param in dict.fromkeys(params):
        if param.blocks:
            by_config.setdefault(param.config, []).append(param)
    return [Controller(params) for params in by_config.values()]


_by_optimizer: weakref.WeakKeyDictionary[Optimizer, Controllers] = weakref.WeakKeyDictionary()


def controllers_of(optimizer: Optimizer) -> list[Controller]:
    """The controllers that an optimizer's steps advance; empty if it steps no parameter of a convaware model itself."""
    return _owned_by(optimizer).of(_params_of(optimizer))


def _owned_by(optimizer: Optimizer) -> Controllers:
    return _by_optimizer.setdefault(optimizer, Controllers())


def _params_of(optimizer: Optimizer) -> list[Any]:
    return [param for group in optimizer.param_groups for param in group["params"]]


@torch.compiler.disable
def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    take(optimizer, params := _params_of(optimizer))
    _owned_by(optimizer).begin()
    controllers = controllers_of(optimizer)
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not controllers and not (callable(closure) and any(registry.find(param) for param in params)):
        return None
    for controller in controllers:
        controller.look()

    def fill() -> None:
        for controller in controllers_of(optimizer):
            if controller not in controllers:
                controller.look()
            controller.fill(optimizer)

    # with a closure the gradients appear inside the step, so the estimates must come right after it; after a restart
    # what was skipped before may belong to groups that only the closure's forward makes known
    if not callable(closure):
        fill()
        return None
    if "closure" in kwargs:
        return args, {**kwargs, "closure": _then(closure, fill)}
    return (args[0], _then(closure, fill), *args[2:]), kwargs


@torch.compiler.disable
def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    put_back(optimizer)
    _owned_by(optimizer).advance(optimizer, _params_of(optimizer))


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
