"""Graphs as AOTAutograd makes them: nodes, sizes, what their inputs stand for, and how what is compiled is called."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import fx

from .lookup import resolve
from .tensors import storage_id

Run = TypeVar("Run", bound=Callable[..., Any])

_PARTITION = "partitioner_tag"
_VISIBLE = "user_visible_output_idxs"


def opname(node: fx.Node) -> str:
    """The name of a node's operation without namespace and overload: `mm`; empty for what is none."""
    return getattr(node.target, "_opname", "")


def kernel_of(operation: Any) -> Callable[..., Any]:
    """An operation's call without the checks of Python's: for where a microsecond counts."""
    return operation._op


def hint_of(size: Any) -> int | None:
    """The size seen when compiling, of a dynamic dimension; None where it depends on data."""
    return size.node.hint


def expression_of(size: Any) -> Any:
    """A dynamic size as an expression of sympy's."""
    return size.node.expr


def root(desc: Any) -> Any:
    """What AOTAutograd's description of an inner tensor, size or stride of a subclass is a part of; else itself."""
    while hasattr(desc, "base"):
        desc = desc.base
    return desc


def rename(node: fx.Node, name: str) -> None:
    """Call a node by this name, or by one that is like it where another has it."""
    node._rename(name)


def put_in_part_of(new: fx.Node, node: fx.Node) -> None:
    """Say that a new node of a joint graph is of the part, forward or backward, that another is said to be of."""
    if tag := node.meta.get(_PARTITION):
        new.meta[_PARTITION] = tag


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy, not by deepcopy: a joint graph's code generator holds trees that do not like to be copied."""
    new = fx.Graph()
    value, output = new.graph_copy(graph, {}, return_output_node=True)
    new.output(value).meta = copy.copy(output.meta)
    new._codegen = graph._codegen
    return new


def erase_output(output: fx.Node, position: int) -> None:
    """Take one of a graph's outputs away, with all that is noted of it."""
    output.args = (tuple(value for i, value in enumerate(output.args[0]) if i != position),)
    if "desc" in output.meta:  # one for each output
        output.meta["desc"] = [desc for i, desc in enumerate(output.meta["desc"]) if i != position]
    if _VISIBLE in output.meta:
        output.meta[_VISIBLE] = [i - (i > position) for i in output.meta[_VISIBLE] if i != position]


def traced_parameters() -> dict[int, torch.nn.Parameter]:
    """The parameters that Dynamo has traced in this frame, by the storages of the fakes that stand for them."""
    context = resolve("TracingContext").try_get()
    if context is None or context.fake_mode is None:
        return {}
    fake_of = context.fake_mode.fake_tensor_converter._get_memo
    params = [real for real in context.tensor_to_context if isinstance(real, torch.nn.Parameter)]
    return {storage_id(fake): param for param in params if (fake := fake_of(param)) is not None}


def boxed(run: Run) -> Run:
    """Say of a callable that it takes its arguments as one list, which it may empty. Gives the callable."""
    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def is_boxed(run: Any) -> bool:
    """Whether a callable takes its arguments as one list."""
    return getattr(run, "_boxed_call", False)
