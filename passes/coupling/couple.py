"""Follow every dimension of every parameter through the forward part of a joint graph. Only looks.

A parameter's dimensions start as leaves; each operation ties, splits or joins them by its rule (`rules`). What is left
are parameters that share leaves: rows of `up` and `gate` and columns of `down` are the hidden neurons of one MLP.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from ..joint import forward_nodes
from .rules import RULES
from .walk import Coupling, Walk


def couple(graph: fx.Graph, params: Mapping[fx.Node, str]) -> Coupling:
    """Walk the forward part of a joint graph. params: the placeholder of every parameter, trained or not, and its name.

    Work is linear in the number of nodes; sizes that are not known when compiling count as they were then.
    """
    wanted = forward_nodes(graph)
    walk = Walk(params, wanted)
    walk.found.nodes = len(graph.nodes)
    for node in graph.nodes:
        if node in wanted or node in params:
            walk.visit(node, RULES)
    return walk.found
