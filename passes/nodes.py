"""Plain questions about nodes of a graph: their sizes, who uses them, and where they lead."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection
from typing import Any

from torch import fx

from cacompile.torch_internals import hint_of, tree_leaves


def sizes(node: Any) -> tuple[Any, ...]:
    """Sizes of a node's result, dynamic ones as they are."""
    return tuple(node.meta["val"].shape)


def hint(size: Any) -> int:
    """The size seen when compiling, also of a dynamic dimension."""
    return size if isinstance(size, int) else hint_of(size) or 1


def numel(node: Any) -> int:
    return math.prod(map(hint, sizes(node)))


def output_of(node: fx.Node, index: int) -> fx.Node | None:
    """The node that takes one of several outputs; None if nobody does."""
    return next((user for user in node.users if user.target is operator.getitem and user.args[1] == index), None)


def uses(node: fx.Node) -> int:
    """How often a node is used; `node.users` counts an output that returns it in two places once."""
    return sum(_times(node, user) for user in node.users)


def reached(node: fx.Node) -> list[fx.Node]:
    """A node and all that is computed from it, the graph's output excluded."""
    seen, waiting = {node: None}, [node]
    while waiting:
        for user in waiting.pop().users:
            if user.op != "output" and user not in seen:
                seen[user] = None
                waiting.append(user)
    return list(seen)


def needed(nodes: Collection[fx.Node]) -> set[fx.Node]:
    """Nodes and all that they are computed from."""
    seen, waiting = set(nodes), list(nodes)
    while waiting:
        new = [source for source in waiting.pop().all_input_nodes if source not in seen]
        seen.update(new)
        waiting += new
    return seen


def exits(node: fx.Node) -> list[int]:
    """The places of the graph's output in which something appears that is computed from this node."""
    found = set(reached(node))
    return [place for place, value in enumerate(node.graph.output_node().args[0]) if value in found]


def _times(node: fx.Node, user: fx.Node) -> int:
    if user.op == "output":  # flat in the graphs of AOTAutograd, and long: not leaf by leaf
        return list(user.args[0]).count(node)
    return tree_leaves((user.args, user.kwargs)).count(node)
