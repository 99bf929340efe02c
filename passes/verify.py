"""Prove after a rewrite that nothing but the planned nodes changed. Only looks."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx

from cacompile.kernels import masked_bmm, masked_conv_dw, masked_grouped_mm, masked_mm

from .kinds import Experts, is_transposed, kind_of
from .marks import MARK
from .mask import FLAGS, HOST_FLAGS
from .products import is_split

aten = torch.ops.aten
_REPLACEMENT = {aten.mm.default: masked_mm, aten.bmm.default: masked_bmm, aten._grouped_mm.default: masked_grouped_mm}

_PREVIOUS = object()
"""Among expected arguments: the node that was expected before this one."""

_GONE = object()
"""Among arguments: a node that was removed."""

_Map = Callable[[Any], Any]
"""Arguments in the graph before -> the same in the graph after."""


class Broken(Exception):
    """A rewrite did something it did not announce; the graph must not run."""


class _Call(NamedTuple):
    """What a node must be."""

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = {}
    op: str = "call_function"


def verify(before: fx.Graph, after: fx.Graph, masked: tuple[str, ...], flags: fx.Node | None = None) -> None:
    """Raise `Broken` unless `after` is `before` with exactly the products of `masked` parameters masked.

    Both graphs are walked side by side. Every node must meet its equal (same operation, same arguments up to what was
    already matched), a planned product its masked replacement on the same operands; nothing may be added, lost or
    reordered beyond the input for the flags, which comes last, or the two for flags on the device and on the host;
    nothing at all where `after` has had its `flags` before.
    """
    names = set(masked)
    image: dict[fx.Node, Any] = {}
    inputs = after.find_nodes(op="placeholder")
    added = [node for node in inputs if node.target in (FLAGS, HOST_FLAGS)]
    if [node.target for node in added] not in ([[FLAGS], [FLAGS, HOST_FLAGS]] if names and flags is None else [[]]):
        raise Broken(f"flags input is {'not wanted' if added and not names else 'missing'}")
    if added != inputs[len(inputs) - len(added) :]:
        raise Broken("flags are not the last inputs")
    given = (*(added if flags is None else [flags]), None)[:2]  # what masked operations get: flags, flags on the host
    rest = iter([node for node in after.nodes if node not in added])

    def mapped(arg: Any) -> Any:
        return fx.map_arg(arg, image.get)

    for old in before.nodes:
        new: Any = None
        for call in _expected(old, names, mapped, given):
            previous, new = new, next(rest, None)
            if new is None:
                raise Broken(f"{old.name} was lost")
            args = tuple(previous if arg is _PREVIOUS else arg for arg in call.args)
            if (new.op, new.target, new.args, new.kwargs) != (call.op, call.target, args, call.kwargs):
                raise Broken(f"{old.format_node()} became {new.format_node()}")
        image[old] = new
    if extra := next(rest, None):
        raise Broken(f"{extra.format_node()} was added")


def verify_truncated(before: fx.Graph, after: fx.Graph, places: Collection[int]) -> None:
    """Raise `Broken` unless `after` is `before` with these outputs None, and less of what has no effect.

    Walked side by side as in `verify`. All inputs stay, and so does everything that what is there is computed from.
    """
    image: dict[fx.Node, Any] = {}

    def mapped(arg: Any) -> Any:
        return fx.map_arg(arg, lambda node: image.get(node, _GONE))

    rest = list(reversed(after.nodes))
    for old in before.nodes:
        args = mapped(old.args)
        if old.op == "output":
            args = (tuple(None if place in places else value for place, value in enumerate(args[0])), *args[1:])
        new = rest[-1] if rest else None
        if new is not None and (new.op, new.target, new.args, new.kwargs) == (
            old.op,
            old.target,
            args,
            mapped(old.kwargs),
        ):
            image[old] = rest.pop()
        elif old.op in ("placeholder", "output") or old.is_impure(impure_random=False):
            raise Broken(f"{old.format_node()} was lost" if new is None else f"{old.name} became {new.format_node()}")
    if rest:
        raise Broken(f"{rest[-1].format_node()} was added, or computed from something else")


def _expected(old: fx.Node, names: set[str], mapped: _Map, given: tuple[Any, ...]) -> list[_Call]:
    """The nodes that must stand in the place of one."""
    source: Any = old.args[0] if old.target is operator.getitem else None
    if source is not None and is_split(source) and _is_planned(source, names):
        return (_experts if _is_experts(source) else _convolution)(old, source, mapped, given)
    if not _is_planned(old, names):
        return [_Call(old.target, mapped(old.args), mapped(old.kwargs), old.op)]
    if not is_split(old):
        return [_Call(_REPLACEMENT.get(old.target), (*mapped(old.args), *given, *old.meta[MARK].arguments()))]
    if _is_experts(old) or not old.args[-1][0]:
        return []  # all that was asked of it comes from elsewhere
    return [_Call(old.target, (*mapped(old.args[:-1]), [True, False, False]))]


def _convolution(old: fx.Node, conv: fx.Node, mapped: _Map, given: tuple[Any, ...]) -> list[_Call]:
    grad_out, x, weight, _, *settings = mapped(conv.args[:-1])
    if old.args[1] == 1:
        return [_Call(masked_conv_dw, (grad_out, x, weight, *given, *conv.meta[MARK].only, *settings))]
    if old.args[1] == 2:
        return [_Call(aten.sum.dim_IntList, (grad_out, [d for d in range(conv.args[0].meta["val"].dim()) if d != 1]))]
    return [_Call(old.target, mapped(old.args))]


def _experts(old: fx.Node, experts: fx.Node, mapped: _Map, given: tuple[Any, ...]) -> list[_Call]:
    x, weight, offs, grad_out = mapped(experts.args)
    if old.args[1] == 0:
        turned = _Call(aten.permute.default, (weight, [0, 2, 1]))
        return [turned, _Call(torch.ops.transformers.grouped_mm_fallback.default, (grad_out, _PREVIOUS, offs))]
    mark, flip = experts.meta[MARK], is_transposed(experts)
    a, b = (grad_out, x) if flip else (x, grad_out)
    where = (mark.transposed if flip else mark).arguments()
    product = [
        _Call(aten.permute.default, (a, [1, 0])),
        _Call(masked_grouped_mm, (_PREVIOUS, b, offs, *given, *where)),
    ]
    return [*product, _Call(aten.permute.default, (_PREVIOUS, [0, 2, 1]))] if flip else product


def _is_planned(node: fx.Node, names: set[str]) -> bool:
    mark = node.meta.get(MARK)
    return mark is not None and mark.param in names


def _is_experts(node: fx.Node) -> bool:
    return isinstance(kind_of(node), Experts)
