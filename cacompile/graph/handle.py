"""The handle: one more input of each graph, which says with which parameters it runs. No compiled code sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from cacompile.passes.joint import GraphInputs
from cacompile.torch_internals import (
    GradAOTOutput,
    PlainAOTInput,
    TracingContext,
    boxed,
    copy_dynamo_graph,
    detect_fake_mode,
    erase_output,
    hint_of,
    insert_output_stride,
    name_input,
    root,
    symbolic_int,
    wrap_compiled,
)

from .inner import Compile

HANDLE = "convaware_handle"
"""Name of the input."""

NOWHERE = 0
"""A handle that no binding has."""

EXAMPLE = 1_000_003
"""Compiled with; like no size of a tensor, of which torch might take it for one."""


def with_handle(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[fx.GraphModule, Any]:
    """A copy of Dynamo's graph with one more input, the handle, and an example of it."""
    graph = copy_dynamo_graph(gm)
    placeholders = graph.graph.find_nodes(op="placeholder")
    with graph.graph.inserting_after(placeholders[-1]):
        node = graph.graph.placeholder(HANDLE)
    handle = symbolic_int(EXAMPLE, HANDLE, detect_fake_mode(example_inputs))
    name_input(node, handle)
    graph.recompile()
    return graph, handle


def find_handle(graph: fx.Graph, inputs: GraphInputs) -> int | None:
    """Position of the handle among the placeholders of a joint, forward, backward or inference graph."""
    for i, node in enumerate(graph.find_nodes(op="placeholder")):
        if node.meta.get("desc") == PlainAOTInput(inputs.handle):
            return i
    return None


def has_handle(graph: fx.Graph, inputs: GraphInputs) -> bool:
    """Whether the input in the handle's place is one: other graphs may have something else there."""
    if (position := find_handle(graph, inputs)) is None:
        return False
    value = graph.find_nodes(op="placeholder")[position].meta.get("val")
    return isinstance(value, torch.SymInt) and hint_of(value) == EXAMPLE


def save_handle(gm: fx.GraphModule, inputs: GraphInputs) -> None:
    """Return the handle as "its own gradient", so that the partitioner saves it for the backward.

    Costs no operation: an input that is an output of the backward is simply saved. The slot is empty otherwise
    (integers have no gradient), and the compiled versions never see it: it is erased from them. It is a number, and
    no tensor: hooks for saved tensors are the user's, and may pack activations with a loss. Raises ValueError where
    the slot cannot be found.
    """
    handle = gm.graph.find_nodes(op="placeholder")[_position(gm.graph, inputs)]
    slot = _grad_slot(gm.graph, inputs)
    output = gm.graph.output_node()
    outputs = list(output.args[0])
    outputs[slot] = handle
    output.args = (tuple(outputs),)
    gm.recompile()


def _position(graph: fx.Graph, inputs: GraphInputs) -> int:
    found = find_handle(graph, inputs)
    if found is None:
        raise ValueError(f"no input of the graph is described as number {inputs.handle}")
    return found


def _grad_slot(graph: fx.Graph, inputs: GraphInputs) -> int:
    """The output that would be the handle's gradient: one for each input, in the inputs' order.

    Counted from the last gradient that there is, since a tensor subclass is several inputs of the graph, and its
    gradient one output or several.
    """
    described = [root(node.meta.get("desc")) for node in graph.find_nodes(op="placeholder")]
    order = {desc: i for i, desc in enumerate(dict.fromkeys(described))}
    output = graph.output_node()
    grads = [(i, root(desc)) for i, desc in enumerate(output.meta["desc"])]
    last, grad = next((i, desc) for i, desc in reversed(grads) if isinstance(desc, GradAOTOutput))
    slot = last + order[PlainAOTInput(inputs.handle)] - order[root(grad.grad_of)]
    if slot >= len(grads) or output.args[0][slot] is not None or slot == last:
        raise ValueError(f"output {slot} of {len(grads)} is not the handle's empty gradient")
    return slot


def erase_handle(gm: fx.GraphModule, handle: int) -> int | None:
    """Remove the handle from a graph's inputs and outputs; returns the output position where it was.

    Raises ValueError where something else reads it.
    """
    node = gm.graph.find_nodes(op="placeholder")[handle]
    output = gm.graph.output_node()
    if any(user is not output for user in node.users):
        raise ValueError(f"something else reads the handle: {', '.join(map(str, node.users))}")
    outputs = list(output.args[0])
    slot = outputs.index(node) if node in outputs else None
    if slot is not None:
        erase_output(output, slot)
    gm.graph.erase_node(node)
    gm.recompile()
    return slot


def without(positions: Sequence[int], gone: int) -> list[int]:
    """Positions in a list of which one entry is gone."""
    return [i - (i > gone) for i in positions if i != gone]


def without_input(settings: dict[str, Any], handle: int) -> dict[str, Any]:
    """`compile_fx_inner`'s keyword arguments for the graph without the input at `handle`."""
    return {**settings, "static_input_idxs": without(settings.get("static_input_idxs", ()), handle)}


Instead = Callable[[Any], Callable[[list[Any]], Any] | None]
"""(handle) -> what runs in place of a graph for it, without the handle as well; None for the graph itself."""


def compile_without_handle(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    settings: dict[str, Any],
    *,
    handle: int,
    compile_inner: Compile,
    instead: Instead = lambda handle: None,
    keep: Callable[[Any, int | None], Any] = lambda compiled, saved_at: compiled,
) -> Any:
    """Compile a graph as if our handle were not among its inputs and saved tensors.

    keep: gets what is compiled, and the handle's position among its outputs; what it makes of that is returned.
    """
    saved_at = erase_handle(gm, handle)
    outputs = len(gm.graph.output_node().args[0])
    compiled: Any = compile_inner(
        gm, [value for i, value in enumerate(inputs) if i != handle], **without_input(settings, handle)
    )
    is_backward = settings.get("is_backward", False)
    if saved_at is not None and not is_backward:
        insert_output_stride(TracingContext.try_get(), saved_at, outputs)
    return keep(around_handle(compiled, handle, saved_at, is_backward=is_backward, instead=instead), saved_at)


def around_handle(
    compiled: Any,
    handle: int,
    saved_at: int | None,
    *,
    is_backward: bool = False,
    instead: Instead = lambda handle: None,
) -> Any:
    """What is compiled, which from now on takes the handle too, and where it was saved gives it back."""

    def wrap(run: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        def with_handle(args: list[Any]) -> Any:
            value = args.pop(handle)
            chosen = instead(value) or run
            if saved_at is None:
                return chosen(args)
            results = list(chosen(args))
            results.insert(saved_at, None if is_backward else value)
            return results

        return boxed(with_handle)

    return wrap_compiled(compiled, wrap)
