"""A graph as Python code, with what is known of every weight gradient beside the line that computes it."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import fx

from cacompile.passes.mask import FLAGS, HOST_FLAGS
from cacompile.torch_internals import GradAOTOutput, PlainAOTInput, TangentAOTInput

from .chosen import DENSE, WAYS
from .facts import Context
from .products import Version, operands, tangents, through_views

TITLES = {
    "joint": "forward and backward in one",
    "forward": "forward, the same for both backwards",
    "backward": "dense backward, runs while all groups are on",
    "masked": "masked backward, runs while a group is off",
}
_FLAGS = {FLAGS: "a byte for each block, 0: skip", HOST_FLAGS: "the same in CPU memory"}


def code(context: Context, version: str) -> str:
    """One version as Python code: `joint`, `forward`, `backward` or `masked`."""
    found = Version.of(context, version)
    return f"{_header(found)}\n{_body(found)}"


def diff(context: Context) -> str:
    """Unified diff from the dense to the masked backward; empty if they are the same."""
    dense, masked = (_body(Version.of(context, version)).splitlines() for version in ("backward", "masked"))
    lines = difflib.unified_diff(dense, masked, "dense backward", "masked backward", n=1, lineterm="")
    return "".join(f"{line}\n" for line in lines)


def _header(found: Version) -> str:
    graphs, products = found.context.graphs, found.products.values()
    where = f"graph {graphs.number} of {found.context.count}" if found.context.count > 1 else "the only graph"
    flops = sum(product.flops for product in products)
    lines = [f"{where}: {TITLES[found.name]}"]
    if found.name != "forward":
        made = "masked" if found.name == "masked" else "can be masked"
        params = len({product.param for product in products})
        lines.append(
            f"{len(found.graph.nodes)} nodes; weight gradients of {params} parameters {made}, "
            f"{flops / found.context.total:.1%} of all dW FLOPs of the model (counted)"
        )
    if found.name == "masked":
        used = dict.fromkeys(product.operation for product in products)
        dense = dict(zip(map(_name, DENSE), DENSE.values()))
        lines += [f"{name}: all on, {dense[name]} itself; all off, zeros without a product" for name in used]
        lines += [f"{way}: {text}" for way, text in WAYS.items() if any(way in product.kernel for product in products)]
    return "".join(f"# {line}\n" for line in lines)


def _name(target: Any) -> str:
    return str(target).split(".")[1]


def _body(found: Version) -> str:
    graph = found.graph
    _comment_inputs(found)
    _comment_outputs(found)
    nodes = list(graph.nodes)
    backward = _first_of_backward(graph) if found.name == "joint" else None

    def write(body: list[str]) -> list[str]:
        lines = []
        for line in body:
            if line.startswith(";  "):
                line = "\n"  # what is freed after its last use
            lines.append(line)
            if line.startswith("# COUNTER: "):
                node = nodes[int(line.removeprefix("# COUNTER: "))]
                if node is backward:
                    lines.append("\n# ---- backward ----\n")
                lines += [f"# {text}\n" for text in (found.products[node].lines() if node in found.products else ())]
        return lines

    graph.on_generate_code(lambda _: write)
    text: str = graph.python_code("self", verbose=True, expanded_def=True).src
    return "".join(f"{line.removesuffix('  # ').rstrip()}\n" for line in text.strip("\n").split("\n")).rstrip() + "\n"


def _comment_inputs(found: Version) -> None:
    graphs = found.context.graphs
    names = graphs.inputs
    needed = _operands(found)
    for node in found.graph.find_nodes(op="placeholder"):
        desc = node.meta.pop("desc", None)
        comment = _FLAGS.get(node.target, "")
        if comment:
            device = "cpu" if node.target == HOST_FLAGS else "meta"
            node.meta["val"] = torch.empty(graphs.plan.blocks, dtype=torch.uint8, device=device)
        elif isinstance(desc, PlainAOTInput) and desc.idx in names:
            comment = names[desc.idx]
        elif isinstance(desc, TangentAOTInput):
            comment = "gradient of an output"
        if node in needed:
            comment += f"{', ' if comment else ''}for dW of {', '.join(needed[node])}"
        if comment:
            node.meta["desc"] = comment


def _comment_outputs(found: Version) -> None:
    """Whose gradients, and why they are always computed; in the forward, what is saved for which gradient."""
    graphs = found.context.graphs
    names = graphs.inputs
    masked = {param for product in found.products.values() for param in (product.param, *product.also)}
    dense = {graphs.called(skip.param): skip.reason for skip in graphs.plan.dense}
    saved = _saved(found) if found.name == "forward" else {}
    output = found.graph.output_node()
    descs = output.meta.get("desc", [None] * len(output.args[0]))
    comments = []
    for value, desc in zip(output.args[0], descs):
        comment = ""
        if isinstance(desc, GradAOTOutput) and isinstance(desc.grad_of, PlainAOTInput) and desc.grad_of.idx in names:
            name = names[desc.grad_of.idx]
            comment = f"dW of {name}"
            if name not in masked and value is not None:
                comment += f", dense: {dense.get(name, 'not planned')}"
        elif isinstance(value, fx.Node) and value.name in saved:
            comment = f"saved for dW of {', '.join(saved[value.name])}"
        comments.append(comment)
    output.meta["desc"] = comments


def _saved(found: Version) -> dict[str, list[str]]:
    """Name of what the forward saves -> parameters whose dW is made of it."""
    if found.context.graphs.backward is None:
        return {}
    backward = Version.of(found.context, "backward")
    return {node.name: params for node, params in _operands(backward).items()}


def _operands(found: Version) -> dict[fx.Node, list[str]]:
    """Inputs of a backward graph that are, turned or reshaped, operands of a dW product -> whose."""
    if found.name in ("joint", "forward"):
        return {}
    needed: dict[fx.Node, list[str]] = {}
    for node, product in found.products.items():
        for operand in operands(node):
            origin = operand if operand.op == "placeholder" else through_views(operand)[-1]
            if origin.op == "placeholder" and product.param not in needed.setdefault(origin, []):
                needed[origin].append(product.param)
    return needed


def _first_of_backward(graph: fx.Graph) -> fx.Node | None:
    """The first node that needs the gradient of an output."""
    needing = set(tangents(graph))
    return next((n for n in graph.nodes if n.op != "output" and needing.intersection(n.all_input_nodes)), None)
