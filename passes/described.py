"""Graphs of whole steps that others have traced, such as torchtitan's, told what their inputs and outputs are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from cacompile.errors import ConvAwareError, unknown
from cacompile.torch_internals import GradAOTOutput, ParamAOTInput


def describe(gm: fx.GraphModule, inputs: Sequence[str], grads: Sequence[str]) -> dict[str, fx.Node]:
    """Say in a traced graph of forward pass, loss and backward what `run_passes` and `find_plan` have to know.

    inputs: what the first inputs are called, in order: parameters, and buffers after or among them.
    grads: the parameters, by those names, whose gradients are the last outputs, in order.
    Returns the inputs by name: one of them may be the flags. Raises ConvAwareError where the graph has fewer.
    """
    placeholders, output = gm.graph.find_nodes(op="placeholder"), gm.graph.output_node()
    results = list(output.args[0]) if isinstance(output.args[0], (tuple, list)) else [output.args[0]]
    for what, given, there in (("inputs", inputs, placeholders), ("grads", grads, results)):
        if len(given) > len(there):
            raise ConvAwareError(f"{what} must be at most the graph's {len(there)}, got {len(given)} names")
    found = dict(zip(inputs, placeholders))
    for name in grads:
        if name not in found:
            raise unknown("gradient of an input:", name, inputs)
    for name in grads:
        found[name].meta["desc"] = ParamAOTInput(name)
    output.args = (tuple(results),)
    output.meta["desc"] = [
        *(None for _ in results[: len(results) - len(grads)]),
        *(GradAOTOutput(ParamAOTInput(name)) for name in grads),
    ]
    return found
