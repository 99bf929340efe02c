"""The graphs of one compiled graph, to be looked at: joint, forward, dense backward and masked backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import fx

from cacompile.errors import ConvAwareError, unknown
from cacompile.graph.compiled import CompiledGraph
from cacompile.passes.kinds import kind_called
from cacompile.passes.marks import MARK
from cacompile.passes.mask import mask_weight_grads
from cacompile.passes.plan import GoneNode, Plan, WeightGrad
from cacompile.torch_internals import PlainAOTInput

VERSIONS = ("joint", "forward", "backward", "masked")
"""joint: forward and backward in one, before they are parted. backward: dense, as it runs while all groups are on.
masked: as it runs while some group is off."""

_NAME = "convaware_name"


@dataclass(frozen=True, slots=True, eq=False)
class Graphs:
    """What is left of a graph's compilation; holds no tensors. A copy of each graph is made when it is asked for."""

    number: int
    plan: Plan
    names: Mapping[str, str]
    """The graph's name of a parameter -> the model's."""
    handle: int
    """Position of our own input among those of Dynamo's graph."""
    forward: fx.Graph | None
    backward: fx.Graph | None
    host: bool
    """Whether the masked version takes the flags in CPU memory too."""

    @classmethod
    def of(cls, number: int, plan: Plan, names: Mapping[str, str], graph: CompiledGraph | None) -> Graphs:
        versions = graph.backward if graph is not None else None
        return cls(
            number,
            plan,
            names,
            graph.inputs.handle if graph is not None else -1,
            graph.forward if graph is not None else None,
            versions.graph if versions is not None else None,
            versions.host if versions is not None else False,
        )

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _gone, ()

    def called(self, param: str) -> str:
        """The model's name of one of the graph's parameters."""
        return self.names.get(param, param)

    @property
    def inputs(self) -> dict[int, str]:
        """Position among the inputs of Dynamo's graph -> the model's name of the parameter that is there."""
        return {param.index: self.called(param.name) for param in self.plan.params}

    @property
    def maskable(self) -> bool:
        """Whether there is a masked version."""
        return self.backward is not None and self.plan.masked != ()

    @property
    def newest(self) -> str:
        """The last of the versions that there is."""
        return "masked" if self.maskable and self.plan.grads else "joint" if self.backward is None else "backward"

    def version(self, name: str) -> fx.Graph:
        """A copy of one version; nodes of the masked one have the names that they have in the dense one."""
        if name not in VERSIONS:
            raise unknown("version", name, VERSIONS)
        if name == "joint":
            return self._without_handle(self._joint())
        if name == "forward":
            return self._without_handle(self.forward or self._missing(name))
        dense = _copied(self.backward or self._missing(name))
        return dense if name == "backward" else self._masked(dense)

    def _joint(self) -> fx.Graph:
        """As Inductor's joint passes left it: planned products are among its nodes."""
        if not self.plan.params or isinstance(self.plan.params[0].placeholder, GoneNode):
            self._missing("joint")
        return self.plan.params[0].placeholder.graph

    def _masked(self, graph: fx.Graph) -> fx.Graph:
        if self.plan.masked == ():
            self._missing("masked")
        for node in graph.nodes:
            node.meta[_NAME] = node.name
        constants = {node.target: None for node in graph.nodes if node.op in ("get_attr", "call_module")}
        with torch.no_grad():
            mask_weight_grads(gm := fx.GraphModule(constants, graph), self.plan, host=self.host)
        used = {node.name for node in gm.graph.nodes}
        for node in gm.graph.nodes:
            if (name := node.meta.pop(_NAME, node.name)) not in used:
                node.name = name
        return gm.graph

    def _without_handle(self, graph: fx.Graph) -> fx.Graph:
        graph = _copied(graph)
        own = PlainAOTInput(self.handle)
        for node in graph.find_nodes(op="placeholder"):
            if node.meta.get("desc") == own:
                output = graph.output_node()
                kept = [place for place, value in enumerate(output.args[0]) if value is not node]
                output.args = (tuple(output.args[0][place] for place in kept),)
                if "desc" in output.meta:
                    output.meta["desc"] = [output.meta["desc"][place] for place in kept]
                graph.erase_node(node)
        return graph

    def _missing(self, name: str) -> NoReturn:
        head = f"graph {self.number} has no {name!r} version: "
        if self.plan.params and isinstance(self.plan.params[0].placeholder, GoneNode):
            raise ConvAwareError(
                f"{head}it was found in torch's cache, which holds its backward only; give explain example inputs, and "
                "it is traced"
            )
        if name not in ("joint", "forward") and self.plan.grads and self.plan.masked is None:
            raise ConvAwareError(f"{head}its backward has not run yet; run one, or give explain example inputs")
        reasons = {self.called(skip.param): skip.reason for skip in self.plan.dense}
        why = "; ".join(f"{param}: {reason}" for param, reason in list(reasons.items())[:3])
        why = f" ({why}{'; ...' if len(reasons) > 3 else ''})" if why else ""
        raise ConvAwareError(f"{head}none of its weight gradients can be skipped{why}")


def _copied(graph: fx.Graph) -> fx.Graph:
    """Without what a joint graph does to its inputs before the first node."""
    new = fx.Graph()
    values: Any = new.graph_copy(graph, {}, return_output_node=True)
    new.output(values[0]).meta = dict(values[1].meta)
    return new


def _gone() -> None:
    """What is left of graphs after pickling."""


def along(grad: WeightGrad) -> str:
    """Which way a gradient is partitioned: the dimension that its blocks lie along."""
    if any(kind_called(p.kind).rank == 3 and p.dim == 0 for p in grad.products):
        return "matrices"
    unit = kind_called(grad.kind).unit_name
    return ("rows", "columns", "entries")[grad.dim] if unit == "rows" else unit


def mark_of(node: fx.Node) -> Any:
    """The Mark of a planned product, or None."""
    return node.meta.get(MARK)
