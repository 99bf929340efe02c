"""Names things in the joint forward-backward graph: parameter <-> placeholder <-> gradient output."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._functorch._aot_autograd.descriptors import GradAOTOutput, PlainAOTInput
from torch._guards import detect_fake_mode

from .plan import Param

HANDLE = "convaware_handle"
"""Name of the extra input that says which module instance a graph runs for."""

_STEP = re.compile(r"\['([^']+)'\]|\[(\d+)\]|\.(\w+)")
_PLUMBING = {"_modules", "_parameters", "_buffers", "_orig_mod", "__self__", "__dict__", "__func__"}


def source_name(source: Any, fallback: str) -> str:
    """Parameter name out of one of Dynamo's sources, such as `L['self']._modules['up']._parameters['weight']`."""
    name = getattr(source, "name", None)
    text = name() if callable(name) else name  # a method before torch 2.12, a property since
    if not text:
        return fallback
    steps = [a or b or c for a, b, c in _STEP.findall(text)]
    return ".".join(step for step in steps[1:] if step not in _PLUMBING) or fallback


def has_trainable(example_inputs: Sequence[Any]) -> bool:
    """Whether any input is a parameter that wants a gradient."""
    return any(isinstance(value, torch.nn.Parameter) and value.requires_grad for value in example_inputs)


@dataclass(frozen=True, slots=True)
class GraphInputs:
    """What Dynamo's graph says of its inputs: position -> parameter name, and where our handle was appended."""

    params: Mapping[int, str]
    """Trainable parameters."""
    frozen: Mapping[int, str]
    """Parameters that want no gradient."""
    handle: int

    @classmethod
    def of(cls, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> GraphInputs:
        """Inputs that are parameters, named through their sources; the handle comes after the last input."""
        placeholders = gm.graph.find_nodes(op="placeholder")
        names = {
            i: source_name(getattr(node, "_dynamo_source", None), node.name)
            for i, (node, value) in enumerate(zip(placeholders, example_inputs, strict=True))
            if isinstance(value, torch.nn.Parameter)
        }
        twice = {name for name, count in Counter(names.values()).items() if count > 1}
        names = {i: f"{n}#{i}" if n in twice else n for i, n in names.items()}
        trained = {i: name for i, name in names.items() if example_inputs[i].requires_grad}
        return cls(trained, {i: n for i, n in names.items() if i not in trained}, len(placeholders))


def find_handle(graph: fx.Graph, inputs: GraphInputs) -> int | None:
    """Position of the handle among the placeholders of a joint, forward, backward or inference graph."""
    for i, node in enumerate(graph.find_nodes(op="placeholder")):
        if node.meta.get("desc") == PlainAOTInput(inputs.handle):
            return i
    return None


def find_params(graph: fx.Graph, inputs: GraphInputs) -> tuple[Param, ...]:
    """Every parameter of a joint graph with its placeholder and the node that is returned as its gradient."""
    output = graph.output_node()
    grads = {
        desc.grad_of.idx: node
        for node, desc in zip(output.args[0], output.meta["desc"], strict=True)
        if isinstance(desc, GradAOTOutput) and isinstance(desc.grad_of, PlainAOTInput)
    }
    params = []
    for node in graph.find_nodes(op="placeholder"):
        desc = node.meta.get("desc")
        if isinstance(desc, PlainAOTInput) and desc.idx in inputs.params:
            grad = grads.get(desc.idx)
            shape = tuple(int(size) for size in node.meta["val"].shape)
            params.append(
                Param(inputs.params[desc.idx], desc.idx, shape, node, grad if isinstance(grad, fx.Node) else None)
            )
    return tuple(params)


def find_frozen(graph: fx.Graph, inputs: GraphInputs) -> dict[fx.Node, str]:
    """The placeholders of parameters that want no gradient, and their names."""
    placeholders = graph.find_nodes(op="placeholder")
    at = {n: n.meta["desc"].idx for n in placeholders if isinstance(n.meta.get("desc"), PlainAOTInput)}
    return {node: inputs.frozen[index] for node, index in at.items() if index in inputs.frozen}


def forward_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes of a joint graph that its forward outputs are computed from."""
    output = graph.output_node()
    descs = output.meta.get("desc", ())
    wanted = {
        node
        for node, desc in zip(output.args[0], descs)
        if isinstance(node, fx.Node) and not isinstance(desc, GradAOTOutput)
    }
    for node in reversed(graph.nodes):
        if node in wanted:
            wanted.update(node.all_input_nodes)
    return wanted


def save_handle(gm: fx.GraphModule, inputs: GraphInputs) -> None:
    """Return the handle as "its own gradient", so that the partitioner saves it for the backward.

    Costs no operation: an input that is an output of the backward is simply saved. The slot is empty otherwise
    (integers have no gradient), and the compiled versions never see it: `versions` strips it.
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


def with_handle(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[fx.GraphModule, torch.Tensor]:
    """A copy of Dynamo's graph with one more input, the handle, and an example of it.

    A copy, because Dynamo reads its own graph's placeholders again after the backend returns.
    """
    graph = copy.copy(gm)
    graph.graph = copy.deepcopy(gm.graph)
    for extra in ("_param_name_to_source", "_source_to_user_stacks"):
        if hasattr(gm, extra):
            setattr(graph, extra, getattr(gm, extra))
    for ours, theirs in zip(graph.graph.nodes, gm.graph.nodes, strict=True):
        if hasattr(theirs, "_dynamo_source"):
            ours._dynamo_source = theirs._dynamo_source
    placeholders = graph.graph.find_nodes(op="placeholder")
    with graph.graph.inserting_after(placeholders[-1]):
        node = graph.graph.placeholder(HANDLE)
    handle = torch.tensor(0, device="cpu")  # whatever the default device is
    fake_mode = detect_fake_mode(example_inputs)
    node.meta["example_value"] = fake_mode.from_tensor(handle) if fake_mode is not None else handle
    node._dynamo_source = None
    graph.recompile()
    return graph, handle
