"""What would be skipped in a model, by which operation, and why the rest is left alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import fx
from torch._functorch import config as functorch_config

from cacompile.config import Config
from cacompile.errors import ConvAwareError
from cacompile.joint import has_trainable
from cacompile.plan import Plan, WeightGrad
from cacompile.region import Region, compile_region
from cacompile.runtime.session import session

_OPERATION = {"linear": "masked_mm", "batched": "masked_bmm", "convolution": "masked_conv_dw"}


@dataclass(frozen=True, slots=True)
class Row:
    """What is known of one parameter in one compiled graph."""

    graph: int
    param: str
    shape: tuple[int, ...]
    kind: str
    nodes: tuple[str, ...]
    """Nodes of the joint graph that compute its gradient."""
    flops: int
    """dW FLOPs of one backward; counted."""
    share: float
    """Of all dW FLOPs, 0 to 1."""
    groups: int
    block: int
    """Rows a group."""
    operation: str
    """What replaces the product when something is skipped; empty if it stays dense."""
    reason: str
    """Why it stays dense; empty if it does not."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """What `explain` found; prints as a table."""

    rows: tuple[Row, ...]
    graphs: int

    @property
    def coverage(self) -> float:
        """Share of dW FLOPs that guarded operations compute, 0 to 1."""
        return sum(row.share for row in self.rows if row.operation)

    def to_dict(self) -> dict[str, Any]:
        return {"graphs": self.graphs, "coverage": self.coverage, "rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        heads = ["parameter", "shape", "gradient from", "dW FLOPs", "groups", "when skipping, or why not"]
        table = [
            (
                row.param,
                "x".join(map(str, row.shape)),
                ", ".join(row.nodes) or row.kind,
                f"{row.share:.1%}",
                f"{row.groups} x {row.block}" if row.groups else "",
                row.operation or f"dense: {row.reason}",
            )
            for row in self.rows
        ]
        guarded = sum(bool(row.operation) for row in self.rows)
        foot = (
            f"{guarded} of {len(self.rows)} parameters guarded, {self.coverage:.1%} of dW FLOPs (counted), "
            f"{self.graphs} graph{'s' if self.graphs != 1 else ''}"
        )
        return f"{tabulate(table, headers=heads, disable_numparse=True)}\n{foot}"


def explain(
    model: torch.nn.Module, *example_inputs: Any, options: Mapping[str, Any] | None = None, **example_kwargs: Any
) -> Explanation:
    """What can be skipped in `model`, and why the rest cannot.

    With example inputs the model runs forward once, without Inductor; its buffers and the random state are put back.
    Without, the graphs are explained that the model was already compiled to and has run with.
    `options` as for `torch.compile`; of a model that has run, its own are taken by default.
    """
    view = session(model)
    if not example_inputs and not example_kwargs:
        plans = list({id(instance.plan): instance.plan for instance in view.instances}.values())
        if not plans:
            raise ConvAwareError(
                "explain(model) needs a model that has run forward with backend='convaware'; "
                "for any other give example inputs: explain(model, *inputs)"
            )
        names = {id(record): name for name, record in view.tracked.items()}
        known = {
            (id(i.plan), record.name): names[id(record)]
            for i in view.instances
            for record in i.records
            if id(record) in names
        }
        return _explanation(plans, known)
    config = Config.from_options(options)[0] if options is not None else view.config or Config()
    return _explanation(_trace(getattr(model, "_orig_mod", model), config, example_inputs, example_kwargs), {})


def _explanation(plans: Sequence[Plan], names: Mapping[tuple[int, str], str]) -> Explanation:
    total = sum(plan.flops for plan in plans) or 1
    rows = []
    for number, plan in enumerate(plans):
        dense = {skip.param: skip for skip in plan.skips}
        grads = {grad.param.name: grad for grad in plan.grads if grad.param.name not in dense}
        for param in plan.params:
            grad, skip = grads.get(param.name), dense.get(param.name)
            source: Any = grad or skip
            rows.append(
                Row(
                    graph=number,
                    param=names.get((id(plan), param.name), param.name),
                    shape=param.shape,
                    kind=source.kind,
                    nodes=tuple(product.node.name for product in grad.products) if grad else (),
                    flops=source.flops,
                    share=source.flops / total,
                    groups=grad.blocks if grad else 0,
                    block=min(grad.block, param.shape[grad.dim]) if grad else 0,
                    operation=_operations(grad) if grad else "",
                    reason=skip.reason if skip else "",
                )
            )
    return Explanation(tuple(rows), len(plans))


def _operations(grad: WeightGrad) -> str:
    return ", ".join(dict.fromkeys(_OPERATION[product.kind] for product in grad.products))


def _trace(model: torch.nn.Module, config: Config, args: Iterable[Any], kwargs: Mapping[str, Any]) -> list[Plan]:
    """The plans of all graphs that `model` would be compiled to, each checked by building its guarded backward."""
    regions: list[Region] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        if not has_trainable(inputs):
            return gm.forward
        # the backward at once, not when it first runs: nothing runs backward here
        with functorch_config.patch(force_non_lazy_backward_lowering=True):
            region, compiled = compile_region(gm, inputs, config, {}, compile_inner=_interpreted)
        regions.append(region)
        # a handle that leads nowhere: looking must not leave an instance behind
        return lambda *args: compiled(*args, torch.tensor(0))

    def forward(*args: Any, **kwargs: Any) -> Any:
        return model.forward(*args, **kwargs)

    with _untouched(model), torch.enable_grad():
        torch.compile(forward, backend=backend)(*args, **kwargs)
    for region in regions:
        if region.backward is not None:
            region.backward.guarded()
    return [region.plan for region in regions]


def _interpreted(gm: fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> Any:
    def run(args: list[Any]) -> Any:
        return torch.fx.Interpreter(gm).boxed_run(args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


@contextlib.contextmanager
def _untouched(model: torch.nn.Module) -> Iterator[None]:
    """Put buffers and random state back after a forward pass."""
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
