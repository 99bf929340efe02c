"""Where in a graph weight gradients are computed, and what is known of each."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from cacompile.passes.plan import Product, WeightGrad
from cacompile.passes.products import producer_of, result_of
from cacompile.torch_internals import TangentAOTInput, opname

from .chosen import is_masked, kernel, masked_blocks, operation
from .facts import Context
from .graphs import along, mark_of


@dataclass(frozen=True, slots=True)
class ExplainedProduct:
    """A node of one graph that computes a weight gradient, or a part of one, that can be skipped."""

    node: str
    param: str
    shape: tuple[int, ...]
    families: tuple[str, ...]
    flops: int
    """dW FLOPs of this node in one backward; counted."""
    share: float
    """Of all dW FLOPs of the model, 0 to 1."""
    blocks: int
    block: int
    """Rows a block."""
    along: str
    """Which way it is partitioned: `rows`."""
    flags: tuple[int, int]
    """[first, last + 1) of its blocks among the graph's flags."""
    operation: str
    """What the node is in the masked backward, such as `masked_mm`; empty elsewhere."""
    kernel: str
    """How it is computed while some of its blocks are off; empty where nothing is masked."""
    also: tuple[str, ...]
    """Other parameters whose gradients are made of this one."""

    def lines(self) -> list[str]:
        """For people."""
        shape = "x".join(map(str, self.shape))
        also = f", and dW of {', '.join(self.also)}" if self.also else ""
        head = f"dW of {self.param} [{shape}]{also}: {', '.join(self.families) or 'no group'}"
        lines = [f"{head}, {figure(self.flops)} FLOPs, {self.share:.1%} of all dW"]
        if self.operation:
            first, stop = self.flags
            lines.append(
                f"{self.operation}: {self.blocks} x {self.block} {self.along}, flags {first}:{stop}; "
                + (f"some off: {self.kernel}" if self.blocks > 1 else "all of it or nothing")
            )
        return lines


@dataclass(slots=True)
class Version:
    """A version of a graph, a copy that may be edited, and its products by node."""

    name: str
    graph: fx.Graph
    context: Context
    products: dict[fx.Node, ExplainedProduct] = field(default_factory=dict)

    @classmethod
    def of(cls, context: Context, version: str) -> Version:
        found = cls(version, context.graphs.version(version), context)
        plan = found.context.graphs.plan
        grads = {grad.param.name: grad for grad in plan.grads}
        by_flag = {grad.first_flag + i: grad for grad in plan.grads for i in range(grad.blocks) if not grad.follows}
        for node in found.graph.nodes:
            if is_masked(node):
                first_flags, blocks = masked_blocks(node)
                first = next(flag for flag, block in zip(first_flags, blocks) if block)
                found.products[node] = _explained(context, node, by_flag[first], first)
            elif version != "masked" and (mark := mark_of(node)) is not None and mark.param in grads:
                dw = result_of(node) or node  # an output of its own where dX is computed as well
                found.products[dw] = _explained(context, dw, grads[mark.param], max(mark.first_flags))
        return found


def _explained(context: Context, node: fx.Node, grad: WeightGrad, first: int) -> ExplainedProduct:
    """first: the flag of the node's first block."""
    graphs, product = context.graphs, _product(grad, first)
    param = graphs.called(grad.param.name)
    masked = is_masked(node)
    count = -(-(product.hi - product.lo) // grad.block)
    also = tuple(graphs.called(g.param.name) for g in graphs.plan.grads if g.follows == grad.param.name)
    return ExplainedProduct(
        node=node.name,
        param=param,
        shape=grad.param.shape,
        families=context.families.get(param, ()),
        flops=product.flops,
        share=product.flops / context.total,
        blocks=count,
        block=min(grad.block, grad.param.shape[grad.dim]),
        along=along(grad),
        flags=(first, first + count),
        operation=operation(node) if masked else "",
        kernel=kernel(node) if masked else "",
        also=also,
    )


def _product(grad: WeightGrad, first: int) -> Product:
    """Which of a gradient's products begins there; several that do, because the weight is used again, are alike."""
    return next((p for p in grad.products if grad.first_flag + p.lo // grad.block == first), grad.products[0])


def operands(node: fx.Node) -> list[fx.Node]:
    """The two factors of a product: dense or masked, of matrices or images."""
    node = producer_of(node)
    return [arg for arg in node.args[:2] if isinstance(arg, fx.Node)]


_VIEWS = {"permute", "view", "reshape", "t", "transpose", "unsqueeze", "squeeze", "expand", "clone", "alias"}
_VIEWS |= {"_to_copy", "convert_element_type", "slice", "detach", "_unsafe_view", "constant_pad_nd"}


def is_view(node: fx.Node) -> bool:
    """Whether a node's values are those of its input, turned, reshaped or converted."""
    return node.op == "call_function" and opname(node) in _VIEWS


def through_views(node: fx.Node) -> list[fx.Node]:
    """A node, and what it is a view of, up to where it is computed."""
    path = [node]
    while is_view(path[-1]) and isinstance(path[-1].args[0], fx.Node):
        path.append(path[-1].args[0])
    return path


def tangents(graph: fx.Graph) -> list[fx.Node]:
    """Inputs that are gradients of outputs."""
    inputs = graph.find_nodes(op="placeholder")
    return [n for n in inputs if isinstance(n.meta.get("desc"), TangentAOTInput) or n.name.startswith("tangents")]


def figure(number: int) -> str:
    return f"{number:,}" if number < 10**7 else f"{number:.3g}"
