"""Names things in the joint forward-backward graph: parameter <-> placeholder <-> gradient output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from cacompile.state.shards import share_of
from cacompile.torch_internals import (
    GradAOTOutput,
    PlainAOTInput,
    dynamo_source,
    in_a_module,
    is_traceable_subclass,
    root,
    source_path,
)

from .plan import Param, Share


def source_name(source: Any, fallback: str) -> str:
    """The name of a parameter by its source; the fallback where it has none."""
    return ".".join(source_path(source)) or fallback


def has_trainable(example_inputs: Sequence[Any]) -> bool:
    """Whether any input is a parameter that wants a gradient."""
    return any(isinstance(value, torch.nn.Parameter) and value.requires_grad for value in example_inputs)


def made_anew(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[str]:
    """Names of what modules hold as weights that are no parameters, but results of operations on other tensors."""
    names = []
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        source = dynamo_source(node)
        if isinstance(value, torch.Tensor) and value.requires_grad and not value.is_leaf and in_a_module(source):
            names.append(source_name(source, node.name))
    return names


@dataclass(frozen=True, slots=True)
class GraphInputs:
    """What Dynamo's graph says of its inputs: position -> parameter name, and where our handle was appended."""

    params: Mapping[int, str]
    """Trainable parameters."""
    frozen: Mapping[int, str]
    """Parameters that want no gradient."""
    handle: int
    opaque: Mapping[int, str] = field(default_factory=dict)
    """Trainable parameters of a tensor subclass of which the graph only has the tensors inside, and what they are."""
    shares: Mapping[int, Share] = field(default_factory=dict)
    """Trainable DTensors, of each of which the graph has this rank's share."""

    @classmethod
    def of(cls, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> GraphInputs:
        """Inputs that are parameters, named through their sources; the handle comes after the last input."""
        placeholders = gm.graph.find_nodes(op="placeholder")
        names = {
            i: source_name(dynamo_source(node), node.name)
            for i, (node, value) in enumerate(zip(placeholders, example_inputs, strict=True))
            if isinstance(value, torch.nn.Parameter)
        }
        twice = {name for name, count in Counter(names.values()).items() if count > 1}
        names = {i: f"{n}#{i}" if n in twice else n for i, n in names.items()}
        trained = {i: name for i, name in names.items() if example_inputs[i].requires_grad}
        frozen = {i: name for i, name in names.items() if i not in trained}
        values = {i: example_inputs[i] for i in trained}
        inside = {i: _inside(value) for i, value in values.items() if is_traceable_subclass(value)}
        shares = {i: share for i, share in inside.items() if isinstance(share, Share)}
        opaque = {i: reason for i, reason in inside.items() if isinstance(reason, str)}
        return cls(trained, frozen, len(placeholders), opaque, shares)


def _inside(value: Any) -> Share | str:
    """What the graph has of a tensor subclass, or why its blocks are not the graph's."""
    if hasattr(value, "to_local"):
        return share_of(value)
    return f"is a {type(value).__name__}, a tensor subclass: its blocks are not the graph's"


def find_params(graph: fx.Graph, inputs: GraphInputs) -> tuple[Param, ...]:
    """Every parameter of a joint graph with its placeholder and the node that is returned as its gradient."""
    output = graph.output_node()
    grads: dict[int, fx.Node] = {}
    for node, desc in zip(output.args[0], map(root, output.meta["desc"]), strict=True):
        of = root(desc.grad_of) if isinstance(desc, GradAOTOutput) else None
        if isinstance(node, fx.Node) and isinstance(of, PlainAOTInput):
            grads.setdefault(of.idx, node)
    params: dict[int, Param] = {}
    for node in graph.find_nodes(op="placeholder"):
        desc, value = root(node.meta.get("desc")), node.meta.get("val")
        if isinstance(desc, PlainAOTInput) and desc.idx in inputs.params and isinstance(value, torch.Tensor):
            index = desc.idx
            shape = tuple(int(size) for size in value.shape)
            opaque, share, grad = inputs.opaque.get(index, ""), inputs.shares.get(index), grads.get(index)
            if share is not None and grad is not None and tuple(grad.meta["val"].shape) != shape:
                opaque, share = "is a DTensor, whose gradient lies on the ranks in another way", None
            # a subclass is several inputs: the first stands for it
            params.setdefault(index, Param(inputs.params[index], index, shape, node, grad, opaque, share))
    return tuple(params.values())


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
        if isinstance(node, fx.Node) and not isinstance(root(desc), GradAOTOutput)
    }
    for node in reversed(graph.nodes):
        if node in wanted:
            wanted.update(node.all_input_nodes)
    return wanted
