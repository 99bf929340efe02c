"""End a backward where nothing below is wanted: outputs that nobody asks for become None, and what made them goes."""

from __future__ import annotations

import copy
from collections.abc import Collection

from torch import fx

from cacompile.torch_internals import GradAOTOutput, PlainAOTInput

from .kinds import kind_of
from .marks import MARK
from .nodes import needed


def grad_places(graph: fx.Graph) -> dict[int, int]:
    """Position of an input of Dynamo's graph -> the place of its gradient among the outputs of a backward graph.

    Of those that are one output each, which a gradient of a tensor subclass is not.
    """
    output = graph.output_node()
    found: dict[int, int] = {}
    for place, (node, desc) in enumerate(zip(output.args[0], output.meta.get("desc", ()))):
        of = desc.grad_of if isinstance(desc, GradAOTOutput) else None
        if isinstance(node, fx.Node) and isinstance(of, PlainAOTInput):
            found.setdefault(of.idx, place)
    return found


def deepest_first(graph: fx.Graph) -> list[int]:
    """The places of a backward's outputs, what is computed last first."""
    number = {node: i for i, node in enumerate(graph.nodes)}
    made = {place: number[node] for place, node in enumerate(graph.output_node().args[0]) if isinstance(node, fx.Node)}
    return sorted(made, key=lambda place: -made[place])


def truncate(gm: fx.GraphModule, places: Collection[int]) -> bool:
    """Make these outputs of a backward graph None. Returns whether anything that it computes went with them.

    Torch's own rules say what has effects, such as mutations and waiting for collectives, and stays.
    """
    output = gm.graph.output_node()
    output.args = (tuple(None if place in places else value for place, value in enumerate(output.args[0])),)
    before = len(gm.graph.nodes)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return len(gm.graph.nodes) < before


def kept_nodes(graph: fx.Graph, places: Collection[int]) -> tuple[int, int]:
    """How many nodes a backward computes with these outputs None, and how many with all. Only looks."""
    constants = {node.target: None for node in graph.nodes if node.op in ("get_attr", "call_module")}
    gm = fx.GraphModule(constants, copy.deepcopy(graph))
    every = _computed(gm.graph)
    truncate(gm, places)
    return _computed(gm.graph), every


def saves_more(graph: fx.Graph, places: Collection[int], more: Collection[int]) -> bool:
    """Whether with `more` outputs None a product goes that no weight gradient is made of: some dX. Only looks."""
    first, second = (_products(graph, none) for none in (places, {*places, *more}))
    return bool(first - second)


def _products(graph: fx.Graph, places: Collection[int]) -> set[str]:
    """Names of the products that a backward computes with these outputs None, but for those that were planned."""
    outputs = enumerate(graph.output_node().args[0])
    wanted = [node for place, node in outputs if isinstance(node, fx.Node) and place not in places]
    return {node.name for node in needed(wanted) if MARK not in node.meta and kind_of(node) is not None}


def _computed(graph: fx.Graph) -> int:
    return sum(node.op not in ("placeholder", "output", "get_attr") for node in graph.nodes)
