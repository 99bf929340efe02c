"""Inductor: its pipeline and options, and what it is told of a graph that it compiles."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from .lookup import resolve


def inductor_alone(gm: fx.GraphModule, example_inputs: Any, patches: dict[str, Any]) -> Callable[..., Any]:
    """The graph as `torch.compile` has it compiled, with nothing of ours. patches: of Inductor's configuration."""
    from torch._inductor.compile_fx import compile_fx  # whatever the table says: without it there is no Inductor

    return compile_fx(gm, example_inputs, config_patches=patches)


def check_inductor_option(name: str, value: Any) -> None:
    """Raise RuntimeError, as torch.compile does, for a value that an option of Inductor's cannot have."""
    torch._TorchCompileInductorWrapper(None, {name: value}, None)


@contextlib.contextmanager
def compiling_backward(context: Any, compile_id: Any) -> Iterator[None]:
    """The surroundings, beside the lock, in which AOTAutograd compiles a backward lazily."""
    with (
        resolve("tracing")(context),
        resolve("compile_context")(compile_id),
        resolve("DisableAutocast")(),
    ):
        yield


@contextlib.contextmanager
def donating(context: Any, donated: list[int] | None) -> Iterator[None]:
    """Tell Inductor which inputs of a backward it may overwrite. context: the forward's TracingContext."""
    if context is None or donated is None:
        yield
        return
    metadata = context.fw_metadata
    before, metadata.bw_donated_idxs = metadata.bw_donated_idxs, donated
    try:
        yield
    finally:
        metadata.bw_donated_idxs = before


def donated_inputs(context: Any) -> list[int] | None:
    """Which inputs of the backward Inductor may overwrite, as AOTAutograd has found; None where it has not."""
    metadata = context.fw_metadata if context is not None else None
    return None if metadata is None else metadata.bw_donated_idxs


@contextlib.contextmanager
def aligned_host_inputs(wanted: bool) -> Iterator[None]:
    """Inductor takes inputs in CPU memory for unaligned, and what is computed with them too: slow reads of every dW.

    Our flags touch no alignment: results of masked operations are memory of their own.
    """
    module = resolve("inductor_graph")
    before = getattr(module, "should_assume_input_aligned", None)
    if not wanted or before is None:
        yield
        return
    module.should_assume_input_aligned = lambda tensor: tensor.device.type == "cpu" or before(tensor)
    try:
        yield
    finally:
        module.should_assume_input_aligned = before


@contextlib.contextmanager
def reported_strides(context: Any) -> Iterator[list[Any]]:
    """What Inductor says of the strides of a graph's outputs; the list stays empty where it says nothing."""
    if context is None:
        yield []
        return
    before, context.output_strides = context.output_strides, []
    try:
        yield context.output_strides
    finally:
        context.output_strides = before


def output_strides(context: Any) -> list[Any]:
    """What Inductor has said of the strides of a forward's outputs; empty where it says nothing."""
    return list(context.output_strides or ()) if context is not None else []


def insert_output_stride(context: Any, position: int, outputs: int) -> None:
    """Say that a forward has one more output, of no known stride. outputs: how many it had before.

    Raises RuntimeError where torch's list of strides is not of these outputs.
    """
    strides = context.output_strides if context is not None else None
    if not strides:
        return
    if len(strides) != outputs:
        raise RuntimeError(f"{len(strides)} strides were reported for {outputs} outputs of a forward graph")
    strides.insert(position, None)


def wrap_compiled(compiled: Any, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Any:
    """Put `wrap(run)` in the place of what a compiled graph runs.

    Inside Inductor's own object, which stays one: it is asked for the partitions of CUDA graphs.
    """
    if not hasattr(compiled, "current_callable"):
        return wrap(compiled)
    compiled.current_callable = wrap(compiled.current_callable)
    return compiled
