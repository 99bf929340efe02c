"""Which families are of one kind: the same in layer after layer, found by the shape of the graph around them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import networkx as nx

from .coupling.axes import Axis, size_of
from .coupling.components import Components

ROUNDS = 3
"""How far around a family the graph is looked at: its weights, their other dimensions, the axes of those."""


def coupling_graph(components: Components) -> nx.Graph:
    """Nodes: (parameter, dimension), and every axis; edges: which dimension has which axis, and which parameter.

    The attribute `what` says of a node all that is the same in every layer.
    """
    graph = nx.Graph()
    coupling = components.coupling
    for leaf, members in components.members.items():
        graph.add_node(leaf, what=f"{components.kind(leaf)} {leaf.size}")
        graph.add_edges_from((leaf, member) for member in members)
    roles: dict[str, list[str]] = defaultdict(list)
    for layer in coupling.layers:
        for name in layer.weights:
            roles[name].append(layer.kind)
    for name, dims in coupling.params.items():
        shape = tuple(map(size_of, dims))
        for dim in range(len(dims)):
            graph.add_node((name, dim), what=f"{shape} {dim} {roles[name]}")
        graph.add_edges_from(((name, 0), (name, dim)) for dim in range(1, len(dims)))
    return graph


def role_hashes(components: Components, leaves: Sequence[Axis]) -> list[str]:
    """A hash for each of these axes, equal where their surroundings are; names and order play no part."""
    graph = coupling_graph(components)
    hashes = nx.weisfeiler_lehman_subgraph_hashes(graph, node_attr="what", iterations=ROUNDS, digest_size=8)
    return [hashes[leaf][-1] if leaf in hashes else f"alone {leaf.size}" for leaf in leaves]
