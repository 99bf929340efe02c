"""The passes without the backend: on anyone's joint graph, or in plain `torch.compile` as `joint_custom_pass`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx

from cacompile.errors import ConvAwareError, unknown
from cacompile.torch_internals import (
    GradAOTOutput,
    ParamAOTInput,
    PlainAOTInput,
    copy_graph,
    storage_id,
    traced_parameters,
)

from .analyse import make_plan
from .joint import forward_nodes, source_name
from .mask import mark_products, mask_weight_grads
from .plan import Param, Plan
from .verify import Broken, verify

log = logging.getLogger(__name__)

PLAN = "convaware_plan"
"""Key in `gm.meta` under which `run_passes` leaves the plan."""

Names = Mapping[str, Tensor] | None
"""Names and parameters, as of `dict(model.named_parameters())`; None: whatever the graph has."""

_LIBRARY = torch.library.Library("cacompile", "FRAGMENT")
_LIBRARY.define("with_flags(Tensor x, Tensor flags) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("with_flags", lambda x, flags: x.clone(), "CompositeExplicitAutograd")
torch.library.register_fake("cacompile::with_flags", lambda x, flags: torch.empty_like(x), lib=_LIBRARY)
torch.library.register_autograd("cacompile::with_flags", lambda ctx, grad: (grad, None), lib=_LIBRARY)
_with_flags = torch.ops.cacompile.with_flags.default


def with_flags(x: Tensor, flags: Tensor) -> Tensor:
    """A copy of `x`; tells `run_passes` that the graph it is in is to skip by `flags`.

    x: any result of the model that needs a gradient, best a small one, such as the loss.
    flags: uint8 [at least the plan's blocks] on the weights' device, see `flags_of`. A buffer of the model, say, to be
    written in place between steps: nothing is compiled again.
    """
    return _with_flags(x, flags)


def run_passes(
    gm: fx.GraphModule,
    joint_inputs: Any = None,
    *,
    params: Names = None,
    block_rows: int = 128,
    flags: fx.Node | None = None,
    on_plan: Callable[[Plan], None] | None = None,
) -> fx.GraphModule:
    """Find the weight gradients and groups of a joint graph; where it carries flags, make their products skip by them.

    Its signature is that of `torch._functorch.config.joint_custom_pass`. The plan is left in
    `gm.meta["convaware_plan"]`, and planned products carry `node.meta["convaware"]` into the backward graph.

    joint_inputs: not looked at.
    params: names and parameters, as of `dict(model.named_parameters())`; by default all that the graph has, named after
    the modules that use them.
    block_rows: as the option of that name.
    flags: the node with the flags, for those who hold the graph; by default what `with_flags` was given.
    on_plan: called with the plan.

    Skipped rows are zeros. What an optimizer makes of zeros is not looked after, as the backend does.
    Raises ConvAwareError for flags that do not fit, and for a graph whose outputs are not described.
    """
    flags = _take_flags(gm.graph) or flags
    plan = find_plan(gm, params=params, block_rows=block_rows)
    mark_products(plan)
    if flags is not None and plan.grads:
        _check_flags(flags, plan)
        plan = _mask(gm, plan, flags)
    gm.recompile()
    gm.meta[PLAN] = plan
    masked = len(plan.masked or ())
    log.info("passes: %d gradients in %d groups, %d masked", len(plan.grads), len(plan.groups), masked)
    if on_plan is not None:
        on_plan(plan)
    return gm


def find_plan(gm: fx.GraphModule, *, params: Names = None, block_rows: int = 128) -> Plan:
    """What can be skipped in a joint graph, and why the rest cannot. Only looks; arguments as of `run_passes`."""
    found, frozen = _find_params(gm.graph, params)
    # nobody here knows what will be captured in a CUDA graph, so the host decides nothing
    return make_plan(found, block_rows=block_rows, graphs=True, frozen=frozen)


def flags_of(plan: Plan, mask: Tensor | Sequence[bool] | Mapping[str, bool] | None = None) -> Tensor:
    """Flags for a plan's graph, uint8 [plan.blocks] in CPU memory.

    mask: bool for each of `plan.groups`; or {name of a group or family: bool}, all others on; None: all on.
    """
    if mask is None or isinstance(mask, Mapping):
        on = _named(plan, mask or {})
    else:
        on = [bool(value) for value in mask]
        if len(on) != len(plan.groups):
            raise ConvAwareError(f"mask must have one entry for each of the {len(plan.groups)} groups, got {len(on)}")
    flags = torch.ones(plan.blocks, dtype=torch.uint8, device="cpu")
    for grad in plan.grads:
        for block, group in enumerate(grad.groups):
            flags[grad.first_flag + block] = on[group]
    return flags


def _named(plan: Plan, mask: Mapping[str, bool]) -> list[bool]:
    families = [plan.families[group.family].name for group in plan.groups]
    known = {*families, *(group.name for group in plan.groups)}
    for name in mask:
        if name not in known:
            raise unknown("group or family in mask:", name, known)
    return [bool(mask.get(group.name, mask.get(family, True))) for group, family in zip(plan.groups, families)]


def _take_flags(graph: fx.Graph) -> fx.Node | None:
    """The node that `with_flags` was given; the operation itself becomes a plain copy."""
    found = graph.find_nodes(op="call_function", target=_with_flags)
    if len({node.args[1] for node in found}) > 1:
        raise ConvAwareError(f"with_flags must be given one tensor of flags in a graph, got {len(found)}")
    flags: Any = None
    for node in found:
        x, flags = node.args
        node.target, node.args = torch.ops.aten.clone.default, (x,)
    return flags


def _check_flags(flags: fx.Node, plan: Plan) -> None:
    value = flags.meta["val"]
    device = plan.grads[0].param.placeholder.meta["val"].device
    given = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    if value.dtype != torch.uint8 or value.dim() != 1 or value.device != device or value.shape[0] < plan.blocks:
        raise ConvAwareError(f"flags must be uint8 [{plan.blocks} or more] on {device}, got {given}")


def _mask(gm: fx.GraphModule, plan: Plan, flags: fx.Node) -> Plan:
    before = copy_graph(gm.graph)
    masked = mask_weight_grads(gm, plan, flags=flags)
    try:
        verify(before, gm.graph, masked.masked or (), flags=flags)
    except Broken as broken:
        log.warning("a rewrite of the joint graph broke its promise, so it stays dense: %s", broken)
        gm.graph = before
        return replace(plan, masked=())
    return masked


def _find_params(graph: fx.Graph, wanted: Names) -> tuple[tuple[Param, ...], dict[fx.Node, str]]:
    """Parameters with a gradient, and the placeholders of those without."""
    output = graph.output_node()
    if "desc" not in output.meta:
        raise ConvAwareError(
            "the joint graph must say what its outputs are, in its output node's meta['desc']: take the graph of "
            "joint_custom_pass or of aot_export_joint_with_descriptors"
        )
    grads = {
        desc.grad_of: node
        for node, desc in zip(output.args[0], output.meta["desc"], strict=True)
        if isinstance(desc, GradAOTOutput)
    }
    name_of = _namer(graph, wanted)
    params, frozen = [], {}
    for position, node in enumerate(graph.find_nodes(op="placeholder")):
        if (name := name_of(node)) is None:
            continue
        desc = node.meta["desc"]
        if isinstance(grad := grads.get(desc), fx.Node):
            index = desc.idx if isinstance(desc, PlainAOTInput) else position
            params.append(Param(name, index, tuple(map(int, node.meta["val"].shape)), node, grad))
        else:
            frozen[node] = name
    return tuple(params), frozen


def _namer(graph: fx.Graph, wanted: Names) -> Callable[[fx.Node], str | None]:
    """What a placeholder is called; None if it is no parameter that is wanted.

    In a joint graph under `torch.compile` inputs have no names, and one that wants a gradient may as well be an
    activation, which no mask may touch.
    """
    real, forward = traced_parameters(), forward_nodes(graph)
    called = None if wanted is None else {id(param): name for name, param in wanted.items()}

    def name_of(node: fx.Node) -> str | None:
        desc, value = node.meta.get("desc"), node.meta.get("val")
        if isinstance(desc, ParamAOTInput):
            return desc.target if wanted is None or desc.target in wanted else None
        if not isinstance(desc, PlainAOTInput) or not isinstance(value, Tensor):
            return None
        param = real.get(storage_id(value))
        if param is None:
            return None
        return _where(node, forward) if called is None else called.get(id(param))

    return name_of


def _where(placeholder: fx.Node, forward: set[fx.Node]) -> str:
    """The module that uses an input, and the input's own name in the graph: there is no better one here."""
    waiting = [placeholder]
    for node in waiting:
        if stack := node.meta.get("nn_module_stack"):
            path, _ = [*stack.values()][-1]
            module = source_name(SimpleNamespace(name=path), "")
            return f"{module}.{placeholder.name}" if module else placeholder.name
        waiting += [user for user in node.users if user in forward and user not in waiting]
    return placeholder.name
