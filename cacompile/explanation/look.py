"""Looks at a model: the graphs that it would be compiled to, without compiling them and without leaving a trace."""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import fx

from cacompile.config import Config
from cacompile.graph.compiled import CompiledGraph, compile_graph, compiled_graphs
from cacompile.graph.handle import NOWHERE
from cacompile.passes.joint import has_trainable
from cacompile.passes.lower import at_mean_sizes
from cacompile.passes.plan import Plan, StaysDense
from cacompile.torch_internals import (
    boxed,
    detect_fake_mode,
    dynamo_config,
    expression_of,
    forget_code,
    functorch_config,
    is_compiled_code,
    register_bytecode_hook,
)

from .fake import faked
from .progress import Progress

CAN_ISOLATE = "isolate_recompiles" in inspect.signature(torch.compile).parameters
"""In newer torch only."""


class RanGraph(NamedTuple):
    """A graph, the parameters that it ran with under its own names for them, and what it was compiled by."""

    plan: Plan
    params: Mapping[str, torch.Tensor]
    graph: CompiledGraph | None


def trace(model: torch.nn.Module, config: Config, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[RanGraph]:
    """All graphs that `model` would be compiled to, each checked by building its masked backward."""
    with Progress(f"explain {type(model).__name__}") as shown:
        return _traced(model, config, args, kwargs, shown)


def _traced(
    model: torch.nn.Module, config: Config, args: Sequence[Any], kwargs: Mapping[str, Any], shown: Progress
) -> list[RanGraph]:
    shown.stage("reading the forward pass")
    runs: dict[tuple[int, ...], tuple[CompiledGraph, dict[str, torch.Tensor], dict[str, int]]] = {}

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        if not has_trainable(inputs):
            return gm.forward
        sizes: dict[str, int] = {}
        shown.stage(f"graph {len({key[0] for key in runs}) + 1}: tracing forward and backward")

        def interpreted(gm: fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> Any:
            return _interpreted(gm, sizes)

        # the backward at once, not when it first runs: nothing runs backward here
        with functorch_config.patch(force_non_lazy_backward_lowering=True):
            graph, compiled = compile_graph(gm, inputs, config, {}, compile_inner=interpreted)

        def run(*args: Any) -> Any:
            params = {param.name: args[param.index] for param in graph.plan.params}
            runs[id(graph), *map(id, params.values())] = graph, params, sizes
            # a handle that leads nowhere: looking must not leave a binding behind
            return compiled(*args, NOWHERE)

        return run

    def forward(*args: Any, **kwargs: Any) -> Any:
        return model.forward(*args, **kwargs)

    # what Dynamo compiles it keeps with the code object, so a new one each time
    fresh = types.FunctionType(forward.__code__.replace(), forward.__globals__, closure=forward.__closure__)
    with faked(model, args, kwargs) as (originals, args, kwargs):
        with _untouched(model), _untouched_dynamo() as options, torch.enable_grad():
            torch.compile(fresh, backend=backend, **options)(*args, **kwargs)
        for number, (graph, *_) in enumerate(runs.values(), 1):
            if graph.backward is not None:
                shown.stage(f"masked backward {number} of {len(runs)}")
                graph.backward.masked_version()
    found = [
        RanGraph(_at_sizes(graph, sizes), {name: originals.get(id(p), p) for name, p in params.items()}, graph)
        for graph, params, sizes in runs.values()
    ]
    runs.clear()  # Dynamo may go on holding what it compiled, the backend with it, but no parameters
    return found


def running(params: Iterable[torch.Tensor]) -> list[RanGraph]:
    """The compiled graphs that have run with any of these parameters, as they are; of several over the same ones, as
    after a recompilation for other sizes, the newest."""
    wanted = {id(param) for param in params}
    found = [(binding, graph) for graph in compiled_graphs() for binding in list(graph.bindings.values())]
    found.sort(key=lambda pair: pair[0].handle)
    runs = []
    for binding, graph in found:
        if wanted.intersection(map(id, binding.inputs.values())):
            plan = at_mean_sizes(graph.plan, sizes) if (sizes := binding.mean_sizes) else graph.plan
            here = [g for g in plan.grads if g.param.name in binding.stay_dense]
            dense = (StaysDense(g.param.name, g.kind, binding.stay_dense[g.param.name], g.flops) for g in here)
            plan = replace(plan, dense=(*plan.dense, *dense))
            runs.append(RanGraph(plan, binding.inputs, graph))
    return list({frozenset(map(id, run.params.values())): run for run in runs}.values())


class _Sizes(fx.Interpreter):
    """Runs a graph and notes what its symbolic sizes are, those too that depend on data. sizes: by the graph's name."""

    def __init__(self, gm: fx.GraphModule, sizes: dict[str, int]) -> None:
        super().__init__(gm)
        self._sizes = sizes

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        value = n.meta.get("val")
        if isinstance(value, torch.Tensor) and isinstance(result, torch.Tensor):
            for size, real in zip(value.shape, result.shape):
                if isinstance(size, torch.SymInt) and type(real) is int:
                    self._sizes[str(expression_of(size))] = real
        elif isinstance(value, torch.SymInt) and type(result) is int:
            self._sizes[str(expression_of(value))] = result
        return result


def _interpreted(gm: fx.GraphModule, sizes: dict[str, int]) -> Any:
    def run(args: list[Any]) -> Any:
        # what the graph makes itself has to be fake where its inputs are
        with detect_fake_mode(args) or contextlib.nullcontext():
            return _Sizes(gm, sizes).boxed_run(args)

    return boxed(run)


def _at_sizes(graph: CompiledGraph, sizes: Mapping[str, int]) -> Plan:
    """The graph's plan with FLOPs of the sizes that it ran with; as compiled where they are not known."""
    known = {
        monomial: math.prod(sizes[atom] for atom in monomial.atoms)
        for monomial in graph.layout.monomials
        if all(atom in sizes for atom in monomial.atoms)
    }
    return at_mean_sizes(graph.plan, known)


@contextlib.contextmanager
def _untouched(model: torch.nn.Module) -> Iterator[None]:
    """Put buffers and random state back after a forward pass."""
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])


@contextlib.contextmanager
def _untouched_dynamo() -> Iterator[dict[str, Any]]:
    """Have Dynamo forget what it compiles here, as after a graph break it does with the model's own code objects.

    Else looking would use up the recompilations that the model may have, and look different the next time.
    Gives options for `torch.compile` that keep apart what it holds already; forgetting that would recompile the model.
    """
    seen: dict[int, tuple[types.CodeType, bool]] = {}

    def note(code: types.CodeType, _: types.CodeType) -> None:
        seen.setdefault(id(code), (code, not is_compiled_code(code)))

    limits = {"recompile_limit": sys.maxsize, "accumulated_recompile_limit": sys.maxsize}
    apart = {"isolate_recompiles": True} if CAN_ISOLATE else {}
    hook = register_bytecode_hook(note)
    try:
        with dynamo_config.patch(**limits, automatic_dynamic_shapes=False):
            yield apart
    finally:
        hook.remove()
        for code, was_new in seen.values():
            if was_new:
                forget_code(code)
