"""What would be skipped in a model, by which operation, and why the rest is left alone."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cacompile.config import Config
from cacompile.errors import ConvAwareError, unknown
from cacompile.plan import Plan, Shared, WeightGrad
from cacompile.runtime.session import named_parameters, session

from . import annotate
from .graphs import Graphs, along
from .groups import Group, list_groups
from .look import Run, running, trace
from .sites import Context

_OPERATION = {
    "linear": "masked_mm",
    "batched": "masked_bmm",
    "grouped": "masked_grouped_mm",
    "convolution": "masked_conv_dw",
}


@dataclass(frozen=True, slots=True)
class Row:
    """What is known of one parameter in one compiled graph."""

    graph: int
    """Which compiled graph; -1 for none."""
    param: str
    shape: tuple[int, ...]
    kind: str
    nodes: tuple[str, ...]
    """Nodes of the joint graph that compute its gradient."""
    flops: int
    """dW FLOPs of one backward; counted."""
    share: float
    """Of all dW FLOPs, 0 to 1."""
    blocks: int
    block: int
    """Rows a block."""
    along: str
    """Which way it is cut: the dimension that its blocks lie along, such as `rows`, or empty."""
    families: tuple[str, ...]
    """Families of groups that its blocks belong to."""
    operation: str
    """What replaces the product when something is skipped; empty if it stays dense."""
    reason: str
    """Why it stays dense; empty if it does not."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """What `explain` found; prints as a table."""

    rows: tuple[Row, ...]
    graphs: int
    groups: tuple[Group, ...]
    """What is kept or skipped together; skipped are those with FLOPs."""
    axes: tuple[Shared, ...]
    """Axes that dimensions of parameters have in common: the coupling graph. `family` counts among `families`."""
    families: tuple[str, ...]
    """Names of the families, graph by graph."""
    cuts: Mapping[str, int]
    """Operations through which the meaning of dimensions could not be followed, and how often."""
    nodes: int
    """Nodes of the joint graphs."""
    analysis_s: float
    """Seconds that it took to analyse them."""
    traced: tuple[Graphs | None, ...] = field(default=(), repr=False, compare=False)
    """The graphs themselves; None in an explanation that was pickled."""

    @property
    def coverage(self) -> float:
        """Share of dW FLOPs that guarded operations compute, 0 to 1."""
        return min(1.0, math.fsum(row.share for row in self.rows if row.operation))

    @property
    def semantic(self) -> float:
        """Share of guarded dW FLOPs in groups that mean something (not plain rows), 0 to 1."""
        guarded = {row.param for row in self.rows if row.operation}
        groups = [g for g in self.groups if any(piece.param in guarded for piece in g.slices)]
        total = sum(group.flops for group in groups)
        return sum(group.flops for group in groups if group.kind != "rows") / total if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "graphs": self.graphs,
            "coverage": self.coverage,
            "semantic": self.semantic,
            "nodes": self.nodes,
            "cuts": dict(self.cuts),
            "rows": [asdict(row) for row in self.rows],
            "groups": [asdict(group) for group in self.groups],
            "axes": [asdict(axis) for axis in self.axes],
            "families": list(self.families),
        }

    def code(self, version: str, graph: int = 0, path: str | os.PathLike[str] | None = None) -> str:
        """A graph as Python code, with what is known of each weight gradient beside the line that computes it.

        version: `joint`, `forward`, `backward` (the dense one) or `guarded`, as Inductor gets them.
        graph: which one, as in `rows`. Written to `path` as well. Raises ConvAwareError for what there is not.
        """
        return _written(annotate.code(self.context(graph), version), path)

    def diff(self, graph: int = 0, path: str | os.PathLike[str] | None = None) -> str:
        """Unified diff of a graph's dense backward to its guarded one, with comments; written to `path` as well."""
        return _written(annotate.diff(self.context(graph)), path)

    def show(
        self,
        param: str,
        format: str = "svg",
        *,
        version: str | None = None,
        graph: int | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> str:
        """A picture of what surrounds a parameter's dW: operands, products, groups, and where it goes.

        format: `svg`, for notebooks and browsers, or `dot`. version: as of `code`, by default the guarded backward,
        or the joint graph where there is none. graph: by default the first in which it can be skipped. Written to
        `path` as well. Raises ConvAwareError for a parameter, version or format that there is not.
        """
        from .dot import dot
        from .draw import Svg, sketched
        from .neighbourhood import sketch_of

        if format not in ("svg", "dot"):
            raise unknown("format", format, ("svg", "dot"))
        sketch = sketch_of(self, param, version, graph)
        return _written(dot(sketch) if format == "dot" else Svg(sketched(sketch)), path)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """All of it, and every product that can be skipped, as `explain.schema.json` in this package says."""
        from .document import text

        return _written(text(self), path)

    def context(self, graph: int) -> Context:
        """What notes on one of the graphs need to know of the model."""
        if isinstance(graph, bool) or not isinstance(graph, int) or not 0 <= graph < len(self.traced):
            raise ConvAwareError(f"graph must be an int from 0 to {len(self.traced) - 1}, got {graph!r}")
        graphs = self.traced[graph]
        if graphs is None:
            raise ConvAwareError("this explanation has no graphs any more, as after pickling; explain the model again")
        total = sum(each.plan.flops for each in self.traced if each is not None) or 1
        return Context(graphs, len(self.traced), total, {row.param: row.families for row in self.rows})

    def to_svg(self, path: str | os.PathLike[str] | None = None) -> str:
        """A picture of the coupling graph, repeated layers drawn once; written to `path` as well."""
        from .draw import Svg, svg

        return _written(Svg(svg(self)), path)

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """A page of its own: the picture, all families and all parameters; written to `path` as well."""
        from .draw import html

        return _written(html(self), path)

    def __str__(self) -> str:
        from tabulate import tabulate  # here, so that training needs torch and numpy alone

        heads = ["parameter", "shape", "gradient from", "dW FLOPs", "blocks", "groups", "when skipping, or why not"]
        table = [
            (
                row.param,
                "x".join(map(str, row.shape)),
                ", ".join(row.nodes) or row.kind,
                f"{row.share:.1%}",
                f"{row.blocks} x {row.block} {row.along}" if row.blocks else "",
                ", ".join(row.families),
                row.operation or f"dense: {row.reason}",
            )
            for row in self.rows
        ]
        guarded = sum(bool(row.operation) for row in self.rows)
        foot = (
            f"{guarded} of {len(self.rows)} parameters guarded, {self.coverage:.1%} of dW FLOPs (counted), "
            f"{self.semantic:.1%} of those in groups with a meaning, "
            f"{self.graphs} graph{'s' if self.graphs != 1 else ''}"
        )
        if self.cuts:
            foot += "\ngroups end at: " + ", ".join(f"{reason} ({count}x)" for reason, count in self.cuts.items())
        return f"{tabulate(table, headers=heads, disable_numparse=True)}\n{foot}"


def _written(text: str, path: str | os.PathLike[str] | None) -> str:
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def explain(
    model: torch.nn.Module, *example_inputs: Any, options: Mapping[str, Any] | None = None, **example_kwargs: Any
) -> Explanation:
    """What can be skipped in `model`, and why the rest cannot.

    With example inputs the model runs forward once, without Inductor; its buffers and the random state are put back.
    Without, the graphs are explained that the model was already compiled to and has run with.
    `options` as for `torch.compile`; of a model that has run, its own are taken by default.
    """
    view = session(model)
    model = getattr(model, "_orig_mod", model)
    if example_inputs or example_kwargs:
        config = Config.from_options(options)[0] if options is not None else view.config or Config()
        return _explanation(trace(model, config, example_inputs, example_kwargs), model)
    runs = running(view.instances)
    if not runs:
        raise ConvAwareError(
            "explain(model) needs a model that has run forward with backend='convaware'; "
            "for any other give example inputs: explain(model, *inputs)"
        )
    return _explanation(runs, model)


def _explanation(runs: Sequence[Run], model: torch.nn.Module) -> Explanation:
    names = {id(param): name for name, param in named_parameters(model)}
    called = [{own: names.get(id(param), own) for own, param in run.params.items()} for run in runs]
    plans = [run.plan for run in runs]
    families_of_plans, groups = list_groups(list(zip(plans, called)))
    total = sum(plan.flops for plan in plans) or 1
    families: dict[str, list[str]] = {}
    for group in groups:
        for piece in group.slices:
            families.setdefault(piece.param, []).append(group.family)
    rows = []
    for number, (plan, name_of) in enumerate(zip(plans, called)):
        dense = {skip.param: skip for skip in plan.skips}
        grads = {grad.param.name: grad for grad in plan.grads if grad.param.name not in dense}
        for param in plan.params:
            name = name_of.get(param.name, param.name)
            grad, skip = grads.get(param.name), dense.get(param.name)
            source: Any = grad or skip
            rows.append(
                Row(
                    graph=number,
                    param=name,
                    shape=param.shape,
                    kind=source.kind,
                    nodes=tuple(product.node.name for product in grad.products) if grad else (),
                    flops=source.flops,
                    share=source.flops / total,
                    blocks=grad.blocks if grad else 0,
                    block=min(grad.block, param.shape[grad.dim]) if grad else 0,
                    along=along(grad) if grad else "",
                    families=tuple(dict.fromkeys(families.get(name, ()))),
                    operation=_operations(grad, grads) if grad else "",
                    reason=skip.reason if skip else "",
                )
            )
    seen = {row.param for row in rows}
    rows += [
        Row(-1, name, tuple(param.shape), "other", (), 0, 0.0, 0, 0, "", (), "", "in no compiled graph that has run")
        for name, param in named_parameters(model)
        if param.requires_grad and name not in seen
    ]
    cuts: Counter[str] = Counter()
    for plan in plans:
        cuts.update(dict(plan.cuts))
    return Explanation(
        rows=tuple(rows),
        graphs=len(runs),
        groups=groups,
        axes=_axes(plans, called),
        families=families_of_plans,
        cuts=cuts,
        nodes=sum(plan.nodes for plan in plans),
        analysis_s=sum(plan.analysis_s for plan in plans),
        traced=tuple(Graphs.of(i, run.plan, own, run.region) for i, (run, own) in enumerate(zip(runs, called))),
    )


def _axes(plans: Sequence[Plan], called: Sequence[Mapping[str, str]]) -> tuple[Shared, ...]:
    axes = []
    first = 0
    for plan, name_of in zip(plans, called):
        for axis in plan.axes:
            members = tuple((name_of.get(name, name), dim) for name, dim in axis.members)
            axes.append(replace(axis, members=members, family=axis.family + first if axis.family >= 0 else -1))
        first += len(plan.families)
    return tuple(axes)


def _operations(grad: WeightGrad, grads: Mapping[str, WeightGrad]) -> str:
    if grad.follows:
        return f"with {grad.follows}" if grad.follows in grads else ""
    return ", ".join(dict.fromkeys(_OPERATION[product.kind] for product in grad.products))
