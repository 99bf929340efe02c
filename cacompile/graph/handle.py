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
    copy_dynamo_graph,
    detect_fake_mode,
    insert_output_stride,
    name_input,
)

from .inner import Compile

HANDLE = "convaware_handle"
"""Name of the input."""


def with_handle(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[fx.GraphModule, torch.Tensor]:
    """A copy of Dynamo's graph with one more input, the handle, and an example of it."""
    graph = copy_dynamo_graph(gm)
    placeholders = graph.graph.find_nodes(op="placeholder")
    with graph.graph.inserting_after(placeholders[-1]):
        node = graph.graph.placeholder(HANDLE)
    handle = torch.tensor(0, device="cpu")  # whatever the default device is
    fake_mode = detect_fake_mode(example_inputs)
    name_input(node, fake_mode.from_tensor(handle) if fake_mode is not None else handle)
    graph.recompile()
    return graph, handle


def find_handle(graph: fx.Graph, inputs: GraphInputs) -> int | None:
    """Position of the handle among the placeholders of a joint, forward, backward or inference graph."""
    for i, node in enumerate(graph.find_nodes(op="placeholder")):
        if node.meta.get("desc") == PlainAOTInput(inputs.handle):
            return i
    return None


def save_handle(gm: fx.GraphModule, inputs: GraphInputs) -> None:
    """Return the handle as "its own gradient", so that the partitioner saves it for the backward.

    Costs no operation: an input that is an output of the backward is simply saved. The slot is empty otherwise
    (integers have no gradient), and the compiled versions never see it: it is erased from them.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    position = {n.meta["desc"].idx: i for i, n in enumerate(placeholders) if isinstance(n.meta["desc"], PlainAOTInput)}
    output = gm.graph.output_node()
    slots = list(output.args[0])
    for slot, desc in enumerate(output.meta["desc"]):
        if isinstance(desc, GradAOTOutput) and isinstance(desc.grad_of, PlainAOTInput):
            # one gradient slot for each input, in the inputs' order
            slots[slot + position[inputs.handle] - position[desc.grad_of.idx]] = placeholders[position[inputs.handle]]
            output.args = (tuple(slots),)
            gm.recompile()
            return


def erase_handle(gm: fx.GraphModule, handle: int) -> int | None:
    """Remove the handle from a graph's inputs and outputs; returns the output position where it was."""
    node = gm.graph.find_nodes(op="placeholder")[handle]
    output = gm.graph.output_node()
    outputs = list(output.args[0])
    slot = outputs.index(node) if node in outputs else None
    if slot is not None:
        del outputs[slot]
        output.args = (tuple(outputs),)
        if "desc" in output.meta:  # one for each output
            output.meta["desc"] = [desc for i, desc in enumerate(output.meta["desc"]) if i != slot]
        if "user_visible_output_idxs" in output.meta:
            output.meta["user_visible_output_idxs"] = without(output.meta["user_visible_output_idxs"], slot)
    gm.graph.erase_node(node)
    gm.recompile()
    return slot


def without(positions: Sequence[int], gone: int) -> list[int]:
    """Positions in a list of which one entry is gone."""
    return [i - (i > gone) for i in positions if i != gone]


def without_input(settings: dict[str, Any], handle: int) -> dict[str, Any]:
    """`compile_fx_inner`'s keyword arguments for the graph without the input at `handle`."""
    return {**settings, "static_input_idxs": without(settings.get("static_input_idxs", ()), handle)}


def compile_without_handle(
    gm: fx.GraphModule, inputs: Sequence[Any], settings: dict[str, Any], *, handle: int, compile_inner: Compile
) -> Any:
    """Compile a graph as if our handle were not among its inputs and saved tensors."""
    saved_at = erase_handle(gm, handle)
    outputs = len(gm.graph.output_node().args[0])
    compiled: Any = compile_inner(
        gm, [value for i, value in enumerate(inputs) if i != handle], **without_input(settings, handle)
    )
    if saved_at is not None and not settings.get("is_backward", False):
        insert_output_stride(TracingContext.try_get(), saved_at, outputs)
    # wrapped inside, so that Inductor still sees its own class (it asks for partitions of CUDA graphs)
    inside = hasattr(compiled, "current_callable")
    run: Callable[[list[Any]], Any] = compiled.current_callable if inside else compiled
    is_backward = settings.get("is_backward", False)

    def with_handle(args: list[Any]) -> Any:
        value = args.pop(handle)
        if saved_at is None:
            return run(args)
        results = list(run(args))
        results.insert(saved_at, None if is_backward else value)
        return results

    if inside:
        compiled.current_callable = with_handle
        return compiled
    with_handle._boxed_call = True  # type: ignore[attr-defined]
    return with_handle
