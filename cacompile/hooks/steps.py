"""Follows every optimizer step without being called: estimates before it, the next mask after it."""

from __future__ import annotations

import functools
import itertools
import logging
import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from cacompile.config import Config
from cacompile.controller.agreement import Agreement
from cacompile.controller.controller import Controller
from cacompile.controller.lending import take_back
from cacompile.controller.shared import Shared
from cacompile.state.params import ParamState
from cacompile.state.registry import registry
from cacompile.state.replicas import Replicas
from cacompile.state.table import newest_structure
from cacompile.torch_internals import is_zero1, may_be_compiling, steps_within_backward, warning_once

from .clipping import follow_clipping
from .counting import count_steps, steps_of
from .joining import follow_joining
from .put_back import put_back, take

log = logging.getLogger(__name__)

OVERLAPPED = (
    "ZeroRedundancyOptimizer(overlap_with_ddp=True) steps within the backward pass, where skipped gradients cannot be "
    "given their estimates: of what it steps nothing is skipped"
)

_moments = itertools.count(1)
"""Beginnings and ends of steps, in their order."""


class Controllers:
    """The controllers of one owner of parameters, made anew when its parameters or their groups have changed."""

    def __init__(self) -> None:
        self._key: tuple[int, list[int]] | None = None
        self._controllers: list[Controller] = []
        self._agreements: dict[Replicas, Agreement] = {}
        self._looking: list[Agreement] = []
        """Those that have seen this step begin."""
        self._within = False
        """Whether the owner is an optimizer within a ZeroRedundancyOptimizer, which is what all ranks step alike."""
        self._steps = 0
        """Of an owner that is no optimizer."""
        self._left: weakref.WeakSet[ParamState] = weakref.WeakSet()
        """Parameters that the owner, an optimizer, leaves to another one within it."""
        self._begun = 0
        """When the owner's last step began, in the count of `_moments`."""
        self._done = False
        """Whether that step is done."""

    def of(self, params: list[Any]) -> list[Controller]:
        ids = [id(param) for param in params]
        if self._key != (newest_structure(), ids):
            states = [s for s in map(registry.find, params) if s is not None and s not in self._left]
            self._controllers = make_controllers(states)
            self._agree(states)
            self._key = newest_structure(), ids  # making them may have joined tables
        return self._controllers

    def _agree(self, states: Iterable[ParamState]) -> None:
        """One agreement with each group of ranks that hold copies of some of these parameters."""
        members: dict[Replicas, list[ParamState]] = {}
        for state in states if not self._within else ():
            if state.replicas is not None:
                members.setdefault(state.replicas, []).append(state)
        found = {}
        for replicas, each in members.items():
            each.sort(key=lambda state: state.place)
            found[replicas] = self._agreements.get(replicas) or Agreement(replicas, each)
            found[replicas].take_members(each)
        self._agreements = found

    def look(self, optimizer: Optimizer | None) -> None:
        """The owner's step begins, and its controllers are made: agreements may want to see the weights.

        Again once a closure has run, which may have made some: those see them then.
        """
        for agreement in self._agreements.values():
            if agreement not in self._looking:
                self._looking.append(agreement)
                agreement.look(optimizer, 0 if optimizer is None else steps_of(optimizer))

    def leave_to(self, inner: Controllers) -> None:
        """What all ranks do alike follows this owner, which all of them step, and not the one within it."""
        if not inner._within:
            inner._within, inner._key = True, None

    def begin(self) -> None:
        """The owner's step begins. The first one may end without: our hooks may come with what is called inside."""
        self._begun, self._done = next(_moments), False
        self._looking.clear()

    def advance(self, optimizer: Optimizer, params: list[Any]) -> None:
        """The owner's step is done, once however often it is hooked, as where `super().step()` is hooked as well.

        What another optimizer has advanced since `begin` is left to that one from now on: Lookahead, SAM and the like
        hold an optimizer that does the work.
        """
        if self._done:
            return
        self._done = True
        controllers = self.of(params)
        own = [controller for controller in controllers if not isinstance(controller, Shared)]
        shared = [state for agreement in self._agreements.values() for state in agreement.members]
        before = [state for controller in own for state in controller.params] + shared
        if stepped := [state for state in before if state.stepped > self._begun]:
            self._left.update(stepped)
            self._key = None
            controllers = self.of(params)
        now = next(_moments)
        for controller in controllers:
            if not isinstance(controller, Shared):
                controller.advance(optimizer)
                for param in controller.params:
                    param.stepped, param.optimizer = now, type(optimizer).__name__
        self.agree(optimizer, steps_of(optimizer))
        for agreement in self._agreements.values():
            for param in agreement.members:
                param.stepped, param.optimizer = now, type(optimizer).__name__

    def agree(self, optimizer: Optimizer | None, steps: int | None = None) -> None:
        """A step is done, also on all other ranks. steps: so far; counted here where the owner is no optimizer."""
        self._steps = self._steps + 1 if steps is None else steps
        if self._controllers:
            registry.forget()
        for agreement in self._agreements.values():
            agreement.advance(optimizer, self._steps)


def make_controllers(params: Iterable[ParamState]) -> list[Controller]:
    """One controller for each Config among the parameters that have groups, and one for those that are replicated."""
    by_config: dict[tuple[Config, Replicas | None], list[ParamState]] = {}
    for param in dict.fromkeys(params):
        if param.blocks:
            by_config.setdefault((param.config, param.replicas), []).append(param)
    return [Controller(params) if replicas is None else Shared(params) for (_, replicas), params in by_config.items()]


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
    if steps_within_backward(optimizer):
        if any(registry.find(param) for param in _params_of(optimizer)):
            warning_once(log, OVERLAPPED)
        return None
    take(optimizer, params := _params_of(optimizer))
    owned = _owned_by(optimizer)
    owned.begin()
    if is_zero1(optimizer) and isinstance(inner := getattr(optimizer, "optim", None), Optimizer):
        owned.leave_to(_owned_by(inner))
    controllers = controllers_of(optimizer)
    owned.look(optimizer)
    traced = may_be_compiling(sys._getframe(1))
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not controllers and not (callable(closure) and any(registry.find(param) for param in params)):
        return None
    for controller in controllers:
        controller.look()

    def fill() -> None:
        found = controllers_of(optimizer)
        owned.look(optimizer)
        for controller in found:
            if controller not in controllers:
                controller.look()
            controller.fill(optimizer, traced=traced)

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
    if steps_within_backward(optimizer):
        return
    take_back(optimizer)
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
    count_steps()  # before what asks for the count
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)
    follow_joining()
    follow_clipping()
