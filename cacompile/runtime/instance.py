"""One compiled graph running with one set of parameters: identical blocks share a graph, never a mask."""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch._logging import warning_once

from cacompile.config import Config
from cacompile.plan import Plan, WeightGrad

from .tracked import Partition, Spent, Tracked, registry
from .units import Group, Member, tie

log = logging.getLogger(__name__)

PATIENCE = 500
"""Backward passes in which an optimizer must have stepped; gradients are rarely accumulated for longer."""

_numbers = itertools.count(1)
_alive: weakref.WeakValueDictionary[int, Instance] = weakref.WeakValueDictionary()


def find_instance(handle: torch.Tensor) -> Instance | None:
    """The instance that a handle names; None once its parameters are gone, or for a handle that is only traced."""
    return _alive.get(int(handle)) if type(handle) is torch.Tensor else None


class Instance:
    """Collects this step's flags from the parameters' records and counts what was saved."""

    def __init__(self, plan: Plan, inputs: Sequence[Any], config: Config) -> None:
        self.plan = plan
        self.handle = torch.tensor(next(_numbers), device="cpu")
        self.spent = Spent()
        self.skips = False
        """Whether the last backward ran the guarded version."""
        self._steps = 0
        self._params = {param.name: weakref.ref(inputs[param.index]) for param in plan.params}
        self._records = _whole(plan, [_join(grad, inputs[grad.param.index], config) for grad in plan.grads])
        _tie(plan, self._records)
        for record in self.records:
            record.spent.append(self.spent)
        self._epoch = -1
        self._any_off = False
        self._off_flops = 0.0
        self._host = torch.ones(plan.blocks, dtype=torch.uint8, device="cpu")
        device = inputs[plan.grads[0].param.index].device if plan.grads else torch.device("cpu")
        self._device = None if device.type == "cpu" else torch.ones_like(self._host, device=device)
        self._captured: list[torch.Tensor] = []
        """Host flags that a CUDA graph of the user's copies to the device in every replay."""
        _alive[int(self.handle)] = self

    @property
    def records(self) -> list[Tracked]:
        return [record for record in self._records if record is not None]

    @property
    def skippable(self) -> list[Tracked]:
        """Records of which this graph leaves out what is off; before its guarded version is made, as planned."""
        guarded = self.plan.guarded
        pairs = zip(self.plan.grads, self._records, strict=True)
        return [r for grad, r in pairs if r is not None and (guarded is None or grad.param.name in guarded)]

    @property
    def params(self) -> dict[str, torch.Tensor]:
        """The graph's name of a parameter -> the one that this instance runs with, if it is alive."""
        return {name: param for name, ref in self._params.items() if (param := ref()) is not None}

    @property
    def guarded_backwards(self) -> int:
        return self.spent.guarded

    def wants_guarded(self) -> bool:
        """Whether some group of this graph is off in the current step."""
        if self._epoch != registry.epoch:
            self._refresh()
        return self._any_off

    def count_backward(self) -> None:
        self.spent.total += self.plan.flops
        self.spent.backwards += 1
        if self.spent.backwards % PATIENCE == 0:
            self._look_for_steps()

    def _look_for_steps(self) -> None:
        """Say once if nothing steps these parameters: masks are drawn after the steps of their optimizer."""
        before, self._steps = self._steps, max((record.step for record in self.records), default=0)
        if self._steps == before and any(record.pin is None for record in self.records):
            warning_once(
                log,
                "%d backward passes of a compiled graph, and no torch.optim.Optimizer has stepped its parameters: what "
                "is skipped is decided after the optimizer's steps, so it stays as it is. If the optimizer is of "
                "another kind, or its step is called past torch's hooks, call cacompile.step(model) after each step",
                PATIENCE,
            )

    def flags(self, guarded: Collection[str]) -> torch.Tensor:
        """This step's flags for the guarded graph, uint8 [blocks] on the graph's device; notes what it will skip."""
        if self._off_flops < 0.0:
            self._off_flops = 0.0
            for grad, record in zip(self.plan.grads, self._records, strict=True):
                if record is not None and grad.param.name in guarded:
                    record.skipped |= ~record.state.on
                    self._off_flops += float(_flops(grad)[~record.state.on].sum())
        self.spent.saved += self._off_flops
        self.spent.guarded += 1
        return self._host if self._device is None else self._device

    @property
    def host_flags(self) -> torch.Tensor:
        """The same flags in CPU memory: never written again, so a backward may go on reading those it was given."""
        return self._host

    def _refresh(self) -> None:
        self._epoch = registry.epoch
        self._off_flops = -1.0  # to be noted by the first backward that skips
        flags = np.ones(self.plan.blocks, np.uint8)
        for grad, record in zip(self.plan.grads, self._records, strict=True):
            if record is not None:
                flags[grad.slot : grad.slot + grad.blocks] = record.state.on
        if np.array_equal(flags, self._host.numpy()):
            return
        self._any_off = not flags.all()
        # a new buffer each time: a running backward may still read the old one, and so may a transfer
        host = torch.from_numpy(flags)
        if self._device is not None:
            host = host.pin_memory()
            if torch.cuda.is_current_stream_capturing():
                self._captured.append(host)
            self._device.copy_(host, non_blocking=True)  # one address for ever, as CUDA graphs need
        self._host = host


def _flops(grad: WeightGrad) -> np.ndarray:
    return np.array(grad.block_flops, float)


def _join(grad: WeightGrad, param: Any, config: Config) -> Tracked | None:
    """The parameter's record, cut as this graph cuts it; None if another graph cut it otherwise."""
    if not isinstance(param, torch.nn.Parameter):
        return None
    record = registry.track(param, grad.param.name)
    if not record.cut(Partition(grad.dim, grad.block, grad.param.shape[grad.dim]), config, grad.param.name):
        log.warning("%s is cut into other groups by another graph; in this one it stays dense", record.name)
        return None
    # a recompilation for other sizes uses the same parameters again, so not a sum
    if (flops := _flops(grad)).max() > record.flops.max():
        record.flops[:] = flops
        registry.generation += 1
    return record


def _whole(plan: Plan, records: list[Tracked | None]) -> list[Tracked | None]:
    """Gradients that one product makes are masked together or not at all."""
    made: dict[str, list[int]] = {}
    for i, grad in enumerate(plan.grads):
        made.setdefault(grad.follows or grad.param.name, []).append(i)
    dense = {i for each in made.values() if any(records[i] is None for i in each) for i in each}
    return [None if i in dense else record for i, record in enumerate(records)]


def _tie(plan: Plan, records: Sequence[Tracked | None]) -> None:
    """Blocks that this graph has in one group are one group from now on."""
    called = {grad.param.name: record for grad, record in zip(plan.grads, records) if record is not None}
    members: dict[int, list[Member]] = {}
    for grad, record in zip(plan.grads, records):
        if record is not None:
            for block, number in enumerate(grad.groups):
                members.setdefault(number, []).append((record, block))
    by_family: dict[int, list[Group]] = {}
    for number, group in enumerate(plan.groups):
        if number in members:
            by_family.setdefault(group.family, []).append(Group(group.start, group.stop, members[number]))
    for number, groups in by_family.items():
        family = plan.families[number]
        makers, weights = ([called[n] for n in names if n in called] for names in (family.makers, family.weights))
        if tie(family.kind, family.kin, makers, weights, groups):
            registry.generation += 1
            registry.epoch += 1
    mates = {id(mate): mate for r in called.values() for unit in r.units for mate, _ in unit.members}
    for record in mates.values():
        if record.pin is not None:
            record.apply_pin()


def instances_of(tracked: Iterable[Tracked]) -> list[Instance]:
    """Live instances that use any of these parameters, in the order they were made."""
    wanted = {id(record) for record in tracked}
    return [
        instance for _, instance in sorted(_alive.items()) if any(id(record) in wanted for record in instance.records)
    ]
