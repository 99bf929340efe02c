"""What would be skipped in a model, by which operation, and why the rest stays dense."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch.nn.parameter import is_lazy

from cacompile.config import Config
from cacompile.errors import ConvAwareError, renamed, unknown
from cacompile.pages.files import file_at
from cacompile.pages.html import render
from cacompile.passes.kinds import kind_called
from cacompile.passes.plan import Plan, SharedAxis, WeightGrad
from cacompile.sessions.session import session
from cacompile.sessions.view import named_parameters
from cacompile.settings import settings
from cacompile.torch_internals import is_fsdp1, uncompiled

from . import code as annotated
from . import tables
from .document import text as document
from .drawing import Svg, dot, svg
from .facts import ExplainedParam, Facts, StepFlops
from .families import families_of
from .graphs import Graphs, along
from .groups import list_groups
from .look import RanGraph, running, trace
from .neighbourhood import neighbourhood
from .picture import picture
from .way_down import way_down

Text = TypeVar("Text", bound=str)

_UNSEEN = "in no compiled graph that has run"


@dataclass(frozen=True, slots=True)
class Explanation(Facts):
    """What `explain` found; prints as a table."""

    def code(
        self, version: str | None = None, graph: int | None = None, path: str | os.PathLike[str] | None = None
    ) -> str:
        """A graph as Python code, with what is known of each weight gradient beside the line that computes it.

        version: `joint`, `forward`, `backward` (the dense one) or `masked`, as Inductor gets them; by default the last
        of backward and masked that there is, else joint. graph: which one, as in `rows`; by default the first, or
        without a version that in which most can be skipped. Written to `path` as well. Raises ConvAwareError for what
        there is not.
        """
        if graph is None:
            graph = 0 if version is not None else self.dearest
        context = self.context(graph)
        return _written(annotated.code(context, _version(version or context.graphs.newest)), path)

    def diff(self, graph: int = 0, path: str | os.PathLike[str] | None = None) -> str:
        """Unified diff of a graph's dense backward to its masked one, with comments; written to `path` as well."""
        return _written(annotated.diff(self.context(graph)), path)

    def show(
        self,
        param: str | None = None,
        format: str = "svg",
        *,
        version: str | None = None,
        graph: int | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> str:
        """A picture of what surrounds a parameter's dW: operands, products, groups, and where it goes.

        Without a parameter, of what is skipped together in the whole model, as of `to_svg`.
        format: `svg`, for notebooks and browsers, or `dot`. version: as of `code`, by default the masked backward,
        or the joint graph where there is none. graph: by default the first in which it can be skipped. Written to
        `path` as well. Raises ConvAwareError for a parameter, version or format that there is not.
        """
        if format not in ("svg", "dot"):
            raise unknown("format", format, ("svg", "dot"))
        if param is None:
            if version is not None or graph is not None:
                raise ConvAwareError("version and graph are of the picture of one parameter, and param is None")
            drawing = picture(self)
        else:
            drawing = neighbourhood(self, param, version and _version(version), graph)
        return _written(dot(drawing) if format == "dot" else svg(drawing), path)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """All of it, and every product that can be skipped, as `explain.schema.json` in this package says."""
        return _written(document(self), path)

    def to_svg(self, path: str | os.PathLike[str] | None = None) -> Svg:
        """A picture of the coupling graph, repeated layers drawn once; written to `path` as well."""
        return _written(svg(picture(self)), path)

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """A page of its own: the picture, all families and all parameters; written to `path` as well."""
        values = {"found": self, "svg": svg(picture(self)).text, "families": families_of(self), "tables": tables}
        return _written(render("explanation.html.jinja", **values), path)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """In notebooks and IPython."""
        printer.text(str(self))

    def __str__(self) -> str:
        return "\n".join([str(tables.parameters(self)), *self.summary])


def _version(name: str) -> str:
    if name != "guarded":
        return name
    renamed("version 'guarded'", "'masked'", depth=1)
    return "masked"


def _written(text: Text, path: str | os.PathLike[str] | None) -> Text:
    if path is not None:
        file_at(path).write_text(text, encoding="utf-8")
    return text


def explain(
    model: torch.nn.Module, *example_inputs: Any, options: Mapping[str, Any] | None = None, **example_kwargs: Any
) -> Explanation:
    """What can be skipped in `model`, and why the rest cannot.

    With example inputs the model runs forward once, without Inductor; its buffers and the random state are put back.
    Without, the graphs are explained that the model was already compiled to and has run with. Weights that are in none
    of them are listed as well: they run in eager mode, or have not run yet.
    `options` as for `torch.compile`; of a model that has run, its own are taken by default.
    Raises ConvAwareError without example inputs for a model that has not run, or with gradients disabled only, and for
    one under FullyShardedDataParallel (FSDP1).
    """
    asked, _ = settings(options)
    view = session(model)
    model = uncompiled(model)
    if lazy := [name for name, param in model.named_parameters() if is_lazy(param)]:
        raise ConvAwareError(f"{lazy[0]} has no shape yet: call the lazy module once before it is explained")
    if is_fsdp1(model):  # to run it would hold up the other ranks
        raise ConvAwareError(
            "nothing can be skipped under FullyShardedDataParallel (FSDP1), where compiled graphs get tensors that are "
            "no parameters: explain the model before it is wrapped, or use fully_shard (FSDP2)"
        )
    trained = [param for _, param in named_parameters(model) if param.requires_grad]
    runs = running(trained)
    if example_inputs or example_kwargs:
        own = view.config or next((run.graph.config for run in runs if run.graph is not None), Config())
        config = asked if options is not None else own
        return _explanation(trace(model, config, example_inputs, example_kwargs), model)
    # gradients without a graph of ours: torch.compile left all of the model to eager mode
    if trained and not runs and all(param.grad is None for param in trained):
        raise ConvAwareError(
            "explain(model) needs a model that has run forward with backend='convaware', not all of it in eager mode "
            "or under torch.no_grad(), where no graph has a backward, nor with weights that are made anew for each "
            "forward pass, as DistributedDataParallel around tensor parallel has them; for any other give example "
            "inputs: explain(model, *inputs)"
        )
    return _explanation(runs, model)


def _explanation(runs: Sequence[RanGraph], model: torch.nn.Module) -> Explanation:
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
        dense = {skip.param: skip for skip in plan.dense}
        grads = {grad.param.name: grad for grad in plan.grads if grad.param.name not in dense}
        for param in plan.params:
            name = name_of.get(param.name, param.name)
            grad, skip = grads.get(param.name), dense.get(param.name)
            source: Any = grad or skip
            rows.append(
                ExplainedParam(
                    graph=number,
                    param=name,
                    shape=param.shape,
                    kind=source.kind,
                    nodes=tuple(product.node.name for product in grad.products) if grad else (),
                    flops=source.flops,
                    share=source.flops / total,
                    counted=param.name not in plan.uncounted,
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
        ExplainedParam(-1, name, tuple(param.shape), "other", (), 0, 0.0, False, 0, 0, "", (), "", _UNSEEN)
        for name, param in named_parameters(model)
        if param.requires_grad and name not in seen
    ]
    since = session(model).frozen_since
    untraced: Counter[str] = Counter()
    for plan in plans:
        untraced.update(dict(plan.untraced))
    return Explanation(
        rows=tuple(replace(row, frozen=since.get(row.param, -1)) for row in rows),
        graphs=len(runs),
        groups=groups,
        axes=_axes(plans, called),
        families=families_of_plans,
        untraced=dict(untraced),
        step=_step(runs, called, since),
        nodes=sum(plan.nodes for plan in plans),
        analysis_s=sum(plan.analysis_s for plan in plans),
        ways_down=tuple(f"graph {i}: {text}" for i, text in enumerate(_ways_down(runs, called, since)) if text),
        traced=tuple(Graphs.of(i, run.plan, own, run.graph) for i, (run, own) in enumerate(zip(runs, called))),
    )


def _step(runs: Sequence[RanGraph], called: Sequence[Mapping[str, str]], since: Mapping[str, int]) -> StepFlops:
    """Of all graphs, without what is frozen, and dX that only it needs, where a backward may end above that."""
    forward = total = dw = 0
    for run, names in zip(runs, called):
        costs, flops = run.plan.costs, run.plan.flops_by_param
        ends = run.graph is not None and run.graph.config.max_truncated > 0
        frozen = [p for p in run.plan.params if ends and names.get(p.name, p.name) in since]
        forward += costs.forward
        total += costs.step - (costs.left_out([p.index for p in frozen]) if frozen else 0)
        dw += run.plan.flops - sum(flops.get(p.name, 0) for p in frozen)
    return StepFlops(int(forward), max(0, int(total - forward - dw)), int(dw))


def _ways_down(runs: Sequence[RanGraph], called: Sequence[Mapping[str, str]], since: Mapping[str, int]) -> list[str]:
    backwards = [run.graph.backward if run.graph is not None else None for run in runs]
    return [
        "" if backward is None or not since else way_down(run.plan, backward.graph, since, names)
        for run, names, backward in zip(runs, called, backwards)
    ]


def _axes(plans: Sequence[Plan], called: Sequence[Mapping[str, str]]) -> tuple[SharedAxis, ...]:
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
    return ", ".join(dict.fromkeys(kind_called(product.kind).operation_name for product in grad.products))
