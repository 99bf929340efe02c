"""Calls of one compiled graph: each runs with the binding of the parameters that it is given."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from cacompile.hooks.steps import follow_optimizers
from cacompile.state.binding import GraphBinding
from cacompile.state.frozen import any_frozen
from cacompile.state.handles import Call
from cacompile.state.identity import identity_of
from cacompile.torch_internals import FakeTensor, captured_backwards, running_ddp, warning_once

from .cuts import Cuts
from .ends import Endings, hooked, without_hooks
from .fallback import warn_of_fault
from .handle import NOWHERE

if TYPE_CHECKING:
    from .compiled import CompiledGraph

log = logging.getLogger(__name__)

DENSE = "all weight gradients of this graph are computed"


class Calls:
    """The bindings of one graph, made as parameters come, and what runs while something is frozen."""

    def __init__(self, cuts: Cuts) -> None:
        self.bindings: dict[tuple[int, ...], GraphBinding] = {}
        """By the ids of the parameters that they run with."""
        self._numbered: weakref.WeakValueDictionary[int, GraphBinding] = weakref.WeakValueDictionary()
        self._endings = Endings()
        self._cuts = cuts
        self._captured = 0
        """Backwards that compiled autograd had traced, of whatever model, when the newest binding was made."""

    def find_binding(self, handle: Any) -> GraphBinding | None:
        """The binding that a handle names; None for one that leads nowhere, such as a traced one."""
        return self._numbered.get(handle) if type(handle) is int else None

    def bind(self, graph: CompiledGraph, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """The callable for Dynamo: adds the handle of the binding whose parameters it is called with."""
        # where nothing can be skipped the binding only tells what has run
        positions = [grad.index for grad in graph.layout.grads] or [index for _, index in graph.layout.params]
        bindings, endings = self.bindings, self._endings

        def run(*args: Any) -> Any:
            binding = bindings.get(tuple([id(args[i]) for i in positions]))
            if binding is None:
                binding = self._new_binding(graph, args, positions)
            elif graph.layout.grads and not binding.spent.total:
                self._look_for_compiled_autograd()
            if binding is None:
                return compiled(*args, NOWHERE)
            if binding.alone:
                binding.look_for_replicas()
            if any_frozen():
                return self._run_frozen(graph, compiled, binding, args)
            if not endings.seen:
                return endings.learn(compiled, [*args, binding.handle])
            return compiled(*args, binding.handle)

        return run

    def _run_frozen(
        self, graph: CompiledGraph, compiled: Callable[..., Any], binding: GraphBinding, args: Sequence[Any]
    ) -> Any:
        """Run while something is frozen: what wants no gradient in the end, here and below, is not to get any."""
        try:
            dead, nothing_else = self._endings.dead(args, graph.layout.params)
            over = nothing_else and binding.is_frozen and torch.is_grad_enabled() and self._endings.sound
            cut = None if over else self._cuts.find(graph.backward, binding, dead)
            waiting = () if over or running_ddp() is not None else hooked(args, binding.frozen)
            call = Call(dead | binding.frozen, None if cut is None else cut.places, detached=bool(waiting))
            handle = binding.handles.of(call)
            self._numbered[handle] = binding
            if cut is not None:
                self._cuts.note(handle, cut)
        except Exception:
            warn_of_fault(log, "looking for what wants a gradient", DENSE)
            return compiled(*args, binding.handle)
        if waiting:
            compiled = without_hooks(compiled, waiting)
        if cut is not None:
            outputs = compiled(*args, handle)
            self._cuts.limit_tracing(graph.backward, cut, outputs)
            return outputs
        if not self._endings.seen:
            return self._endings.learn(compiled, [*args, handle])
        # DistributedDataParallel waits for all its parameters, if only for them to have no gradient
        if over and running_ddp() is None:
            binding.count_forward()
            return self._endings.run(compiled, [*args, handle])
        return compiled(*args, handle)

    def _new_binding(self, graph: CompiledGraph, args: Sequence[Any], positions: list[int]) -> GraphBinding | None:
        """A new binding for these inputs; None for traced inputs, or if it fails."""
        if any(isinstance(arg, FakeTensor) for arg in args):
            return None
        try:
            follow_optimizers()
            key = tuple(id(args[i]) for i in positions)
            binding = self.bindings[key] = GraphBinding(graph.layout, args, graph.config)
            self._captured = captured_backwards()
            self._numbered[binding.handle] = binding
            forget = functools.partial(_forget, weakref.ref(self), key)
            for i in positions:
                identity_of(args[i]).at_end(forget)
            return binding
        except Exception:
            warn_of_fault(log, "binding a graph to its parameters", DENSE)
            return None

    def _look_for_compiled_autograd(self) -> None:
        """For a binding that has run forward before, but never backward through us: say why, if that is why."""
        if captured_backwards() > self._captured:
            warning_once(
                log,
                "compiled autograd traces the backward into a graph of its own, where nothing can be skipped: "
                "all weight gradients stay dense. Train without compiled autograd to skip those that have converged",
            )


def _forget(calls: weakref.ref[Calls], key: tuple[int, ...]) -> None:
    """A parameter has died, and its id may be given to another."""
    if (alive := calls()) is not None:
        alive.bindings.pop(key, None)
