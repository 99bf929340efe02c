"""One compiled graph running with one set of parameters: identical blocks share a graph, never a mask."""

from __future__ import annotations

import logging
import operator
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from cacompile.config import Config
from cacompile.layout import MaskLayout
from cacompile.torch_internals import has_hooks, warning_once

from .beginning import begin
from .frozen import any_frozen, newest_freeze
from .graph_counts import GraphCounts
from .handles import Handles
from .identity import Identity, identity_of
from .params import ParamState
from .parting import PARTED, SPREAD, part, tie_groups, together
from .pins import hold_pins, newest_pin
from .registry import registry
from .replicas import find_replicas, join_shares
from .shards import owner_of
from .table import BlockTable

log = logging.getLogger(__name__)

PATIENCE = 500
"""Backward passes in which an optimizer must have stepped; gradients are rarely accumulated for longer."""

_alive: weakref.WeakValueDictionary[int, GraphBinding] = weakref.WeakValueDictionary()


class GraphBinding(GraphCounts):
    """This step's flags for one graph, gathered from its parameters' blocks, and the count of what was saved."""

    def __init__(self, layout: MaskLayout, inputs: Sequence[Any], config: Config) -> None:
        # before blocks are made, which know of other ranks
        replicas = find_replicas(inputs)
        shares = join_shares([(grad.param, inputs[grad.index]) for grad in layout.grads])
        super().__init__(layout, together(layout, [part(grad, inputs[grad.index], config) for grad in layout.grads]))
        self.handles = Handles()
        self.handle = self.handles.own
        self.ran = "dense"
        """The version that the last backward ran."""
        self._freeze = -1
        self._frozen: frozenset[int] = frozenset()
        self._steps = 0
        self.alone = not (replicas or shares)
        """Whether no other rank is known to hold copies of its parameters, or shares that are decided on together."""
        self.stay_dense = {
            grad.param: SPREAD if hasattr(inputs[grad.index], "to_local") else PARTED
            for grad, state in self._pairs()
            if state is None
        }
        """Parameters that the graph could mask, but not where it runs with these, and why."""
        self._inputs = {name: identity_of(inputs[index]) for name, index in layout.params}
        for name, index in layout.params:
            if owner_of(inputs[index]) is not None:
                registry.track(inputs[index], name)
        tie_groups(layout, self._params)
        self._pins = newest_pin()
        hold_pins()
        begin(layout, inputs, config, self._params)
        self._any_off = False
        self._mask_version = 0
        self._structure = 0
        self._rows = np.zeros(0, np.int64)
        """The table's row of each flag, of those that have one."""
        self._has_row = np.zeros(layout.blocks, bool)
        self._left_out: tuple[np.ndarray, list[int]] | None = None
        """Rows that the masked version leaves out with the present flags, and how many dW FLOPs those are to one of
        each monomial; None until it runs."""
        self._whole: dict[int, Identity] | None = None
        """Of which parameters, by position, it leaves out everything; None until it is asked for."""
        self._host = torch.ones(layout.blocks, dtype=torch.uint8, device="cpu")
        device = inputs[layout.grads[0].index].device if layout.grads else torch.device("cpu")
        self._device = None if device.type == "cpu" else torch.ones_like(self._host, device=device)
        self._captured: list[torch.Tensor] = []
        """Host flags that a CUDA graph of the user's copies to the device in every replay."""
        _alive[self.handle] = self

    @property
    def layout(self) -> MaskLayout:
        """What the graph masks; another one once its masked version was made."""
        return self._layout

    @layout.setter
    def layout(self, layout: MaskLayout) -> None:
        self._layout, self._left_out, self._whole = layout, None, None

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """The graph's name of a parameter -> the one that this binding runs with, as optimizers have it, if alive."""
        owners = ((name, one.tensor if one.data is None else one.data.param) for name, one in self._inputs.items())
        return {name: param for name, param in owners if param is not None}

    def live_inputs(self) -> Iterator[torch.Tensor]:
        """Its parameters that have blocks in this graph, one by one, as the graph gets them."""
        tensors = (self._inputs[grad.param].tensor for grad, state in self._pairs() if state is not None)
        return (tensor for tensor in tensors if tensor is not None)

    @property
    def frozen(self) -> frozenset[int]:
        """Positions, among the inputs of Dynamo's graph, of parameters that are frozen as a whole."""
        if self._freeze != newest_freeze():
            self._find_frozen()
        return self._frozen

    @property
    def is_frozen(self) -> bool:
        """Whether nothing of it is trained."""
        return len(self.frozen) == len(self._layout.params)

    @property
    def skipped_whole(self) -> dict[int, torch.Tensor]:
        """Position -> parameter, of those of which the masked version would leave out everything."""
        if self._whole is None:
            off = self._host.numpy() == 0
            masked = (grad for grad, param in self._pairs() if param is not None and self._masks(grad))
            self._whole = {grad.index: self._inputs[grad.param] for grad in masked if off[grad.flags].all()}
        return {index: tensor for index, one in self._whole.items() if (tensor := one.tensor) is not None}

    def hooked(self, positions: frozenset[int]) -> dict[int, torch.Tensor]:
        """Position -> parameter, of those of these that have hooks which are called with their gradient."""
        found = {index: self._inputs[name].tensor for name, index in self._layout.params if index in positions}
        return {index: param for index, param in found.items() if param is not None and has_hooks(param)}

    def look_for_replicas(self) -> None:
        """It runs once more: maybe inside of DistributedDataParallel now."""
        self.alone = not find_replicas()

    def wants_masked(self) -> bool:
        """Whether some group of this graph is off in the current step."""
        if self._pins != newest_pin():
            self._look_for_pins()
        table = self._table
        if self._freeze != newest_freeze():
            self._find_frozen()
        if table is not None and self._mask_version != table.mask_version:
            self._gather(table)
        return self._any_off

    def count_backward(self, sizes: Sequence[int]) -> None:
        super().count_backward(sizes)
        if self.spent.backwards % PATIENCE == 0:
            self._look_for_steps()

    def leave_out(self, sizes: Sequence[int]) -> torch.Tensor:
        """Note what the masked version will leave out now; this step's flags, uint8 [blocks] on the graph's device."""
        if self._left_out is None:
            self._left_out = self._find_left_out()
        rows, coefficients = self._left_out
        table = self._table
        assert table is not None
        table.skipped[rows] = True
        self.spent.saved += sum(map(operator.mul, sizes, coefficients))
        self.spent.masked += 1
        return self._host if self._device is None else self._device

    @property
    def host_flags(self) -> torch.Tensor:
        """The same flags in CPU memory: never written again, so a backward may go on reading those it was given."""
        return self._host

    @property
    def _table(self) -> BlockTable | None:
        """The table that all its parameters with blocks are in."""
        return next((param.table for param in self._params if param is not None), None)

    def _find_left_out(self) -> tuple[np.ndarray, list[int]]:
        off = self._host.numpy() == 0
        for grad, param in self._pairs():
            if param is None or not self._masks(grad):
                off[grad.flags] = False
            elif any_frozen():  # what is frozen is not skipped, and has no estimate
                off[grad.flags] &= ~param.frozen_blocks[grad.here]
        coefficients: list[int] = (self._layout.coefficients_by_block @ off).tolist()
        return self._rows[off[self._has_row]], coefficients

    def _gather(self, table: BlockTable) -> None:
        """Read the mask of all its blocks out of the table."""
        if self._structure != table.structure:
            self._find_rows(table)
        self._mask_version, self._left_out, self._whole = table.mask_version, None, None
        flags = np.ones(len(self._has_row), np.uint8)
        flags[self._has_row] = table.on[self._rows]
        for grad, param in self._pairs() if any_frozen() else ():
            if param is not None and param.is_frozen:  # nobody is to get that gradient
                flags[grad.flags] = 1
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

    def _find_frozen(self) -> None:
        self._freeze, self._mask_version = newest_freeze(), 0  # what is frozen as a whole needs no flags
        states = ((index, self._inputs[name].data) for name, index in self._layout.params)
        self._frozen = frozenset(i for i, state in states if state is not None and state.is_frozen)

    def _find_rows(self, table: BlockTable) -> None:
        rows = np.zeros(len(self._has_row), np.int64)
        for grad, param in self._pairs():
            if param is not None:
                self._has_row[grad.flags] = True
                rows[grad.flags] = np.arange(len(table))[param.rows][grad.here]
        self._rows, self._structure = rows[self._has_row], table.structure

    def _look_for_pins(self) -> None:
        """Pins were made since: maybe while the model had other parameters in the place of these."""
        self._pins = newest_pin()
        if any(param.pinned_at < self._pins for param in self.params):
            hold_pins()

    def _look_for_steps(self) -> None:
        """Say once if nothing steps these parameters: masks are drawn after the steps of their optimizer."""
        before, self._steps = self._steps, max((param.step for param in self.params), default=0)
        if self._steps == before and any(param.pin is None for param in self.params):
            warning_once(
                log,
                "%d backward passes of a compiled graph, and no torch.optim.Optimizer has stepped its parameters: what "
                "is skipped is decided after the optimizer's steps, so it stays as it is. If the optimizer is of "
                "another kind, or its step is called past torch's hooks, call cacompile.step(model) after each step",
                PATIENCE,
            )


def bindings_with(tensors: Iterable[torch.Tensor]) -> list[GraphBinding]:
    """Live bindings that run with any of these, also where nothing of them can be skipped."""
    wanted = set(map(id, tensors))
    return [one for _, one in sorted(_alive.items()) if any(id(t) in wanted for t in one.inputs.values())]


def bindings_of(params: Iterable[ParamState]) -> list[GraphBinding]:
    """Live bindings that use any of these parameters, in the order they were made."""
    wanted = {id(param) for param in params}
    return [binding for _, binding in sorted(_alive.items()) if any(id(param) in wanted for param in binding.params)]
