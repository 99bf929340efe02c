"""What would be skipped in a model, by which operation, and why the rest is left alone."""

from __future__ import annotations

import contextlib
import inspect
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx
from torch._C._dynamo import eval_frame
from torch._dynamo import config as dynamo_config
from torch._dynamo.convert_frame import register_bytecode_hook
from torch._functorch import config as functorch_config

from cacompile.config import Config
from cacompile.errors import ConvAwareError
from cacompile.joint import has_trainable
from cacompile.plan import Plan, WeightGrad
from cacompile.region import Region, compile_region
from cacompile.runtime.session import named_parameters, session

_OPERATION = {"linear": "masked_mm", "batched": "masked_bmm", "convolution": "masked_conv_dw"}
_CAN_ISOLATE = "isolate_recompiles" in inspect.signature(torch.compile).parameters  # in newer torch only


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
        from tabulate import tabulate  # here, so that training needs torch and numpy alone

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
    model = getattr(model, "_orig_mod", model)
    if example_inputs or example_kwargs:
        config = Config.from_options(options)[0] if options is not None else view.config or Config()
        return _explanation(_trace(model, config, example_inputs, example_kwargs), model)
    # of several over the same parameters, as after a recompilation for other sizes, the newest
    newest = {frozenset(map(id, (params := i.params).values())): (i.plan, params) for i in view.instances}
    if not newest:
        raise ConvAwareError(
            "explain(model) needs a model that has run forward with backend='convaware'; "
            "for any other give example inputs: explain(model, *inputs)"
        )
    return _explanation(list(newest.values()), model)


_Run = tuple[Plan, Mapping[str, torch.Tensor]]
"""A graph, and the parameters that it ran with under its own names for them."""


def _explanation(runs: Sequence[_Run], model: torch.nn.Module) -> Explanation:
    names = {id(param): name for name, param in named_parameters(model)}
    total = sum(plan.flops for plan, _ in runs) or 1
    rows = []
    for number, (plan, params) in enumerate(runs):
        dense = {skip.param: skip for skip in plan.skips}
        grads = {grad.param.name: grad for grad in plan.grads if grad.param.name not in dense}
        for param in plan.params:
            grad, skip = grads.get(param.name), dense.get(param.name)
            source: Any = grad or skip
            rows.append(
                Row(
                    graph=number,
                    param=names.get(id(params.get(param.name)), param.name),
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
    return Explanation(tuple(rows), len(runs))


def _operations(grad: WeightGrad) -> str:
    return ", ".join(dict.fromkeys(_OPERATION[product.kind] for product in grad.products))


def _trace(model: torch.nn.Module, config: Config, args: Iterable[Any], kwargs: Mapping[str, Any]) -> list[_Run]:
    """All graphs that `model` would be compiled to, each checked by building its guarded backward."""
    runs: dict[tuple[int, ...], tuple[Region, dict[str, torch.Tensor]]] = {}

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        if not has_trainable(inputs):
            return gm.forward
        # the backward at once, not when it first runs: nothing runs backward here
        with functorch_config.patch(force_non_lazy_backward_lowering=True):
            region, compiled = compile_region(gm, inputs, config, {}, compile_inner=_interpreted)

        def run(*args: Any) -> Any:
            params = {param.name: args[param.index] for param in region.plan.params}
            runs[id(region), *map(id, params.values())] = region, params
            # a handle that leads nowhere: looking must not leave an instance behind
            return compiled(*args, torch.tensor(0, device="cpu"))

        return run

    def forward(*args: Any, **kwargs: Any) -> Any:
        return model.forward(*args, **kwargs)

    # what Dynamo compiles it keeps with the code object, so a new one each time
    fresh = types.FunctionType(forward.__code__.replace(), forward.__globals__, closure=forward.__closure__)
    with _untouched(model), _untouched_dynamo() as options, torch.enable_grad():
        torch.compile(fresh, backend=backend, **options)(*args, **kwargs)
    for region, _ in runs.values():
        if region.backward is not None:
            region.backward.guarded()
    return [(region.plan, params) for region, params in runs.values()]


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


@contextlib.contextmanager
def _untouched_dynamo() -> Iterator[dict[str, Any]]:
    """Have Dynamo forget what it compiles here, as after a graph break it does with the model's own code objects.

    Else looking would use up the recompilations that the model may have, and look different the next time.
    Gives options for `torch.compile` that keep apart what it holds already; forgetting that would recompile the model.
    """
    seen: dict[int, tuple[types.CodeType, bool]] = {}

    def note(code: types.CodeType, _: types.CodeType) -> None:
        seen.setdefault(id(code), (code, not eval_frame._debug_get_cache_entry_list(code)))

    limits = {"recompile_limit": sys.maxsize, "accumulated_recompile_limit": sys.maxsize}
    apart = {"isolate_recompiles": True} if _CAN_ISOLATE else {}
    hook = register_bytecode_hook(note)
    try:
        with dynamo_config.patch(**limits, automatic_dynamic_shapes=False):
            yield apart
    finally:
        hook.remove()
        for code, was_new in seen.values():
            if was_new:
                eval_frame.reset_code(code)
