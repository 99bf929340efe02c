"""Prove after a rewrite that nothing but the planned nodes changed. Only looks."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from cacompile.kernels import masked_bmm, masked_conv_dw, masked_mm

from .guard import FLAGS, HOST_FLAGS, MARK, sites

aten = torch.ops.aten
_TWIN = {aten.mm.default: masked_mm, aten.bmm.default: masked_bmm}


class Broken(Exception):
    """A rewrite did something it did not announce; the graph must not run."""


def verify(before: fx.Graph, after: fx.Graph, guarded: tuple[str, ...]) -> None:
    """Raise `Broken` unless `after` is `before` with exactly the products of `guarded` parameters masked.

    Both graphs are walked side by side. Every node must meet its equal (same operation, same arguments up to what was
    already matched), a planned product its masked twin on the same operands; nothing may be added, lost or reordered
    beyond the input for the flags, which comes last, or the two for flags on the device and on the host.
    """
    names = set(guarded)
    image: dict[fx.Node, fx.Node | tuple[fx.Node, ...]] = {}
    inputs = after.find_nodes(op="placeholder")
    added = [node for node in inputs if node.target in (FLAGS, HOST_FLAGS)]
    if [node.target for node in added] not in ([[FLAGS], [FLAGS, HOST_FLAGS]] if names else [[]]):
        raise Broken(f"flags input is {'not wanted' if added and not names else 'missing'}")
    if added != inputs[len(inputs) - len(added) :]:
        raise Broken("flags are not the last inputs")
    given = (*added, None)[:2]  # what masked operations get: flags, flags on the host
    rest = iter([node for node in after.nodes if node not in added])

    def mapped(arg: Any) -> Any:
        return fx.map_arg(arg, image.get)

    splits = {n for n in before.nodes if _is_planned(n, names) and n.target is aten.convolution_backward.default}
    for old in before.nodes:
        if old in splits and not old.args[-1][0]:
            continue  # no data gradient is asked of this convolution: it goes
        new = next(rest, None)
        if new is None:
            raise Broken(f"{old.name} was lost")
        image[old] = new
        if old in splits:
            expected = (mapped(old.args[:-1]), [True, False, False])
            same = new.target is old.target and (new.args[:-1], list(new.args[-1])) == expected
        elif _is_output(old, splits, 2):
            grad_out = old.args[0].args[0]
            same = new.target is aten.sum.dim_IntList and new.args == (mapped(grad_out), sites(grad_out))
        elif _is_output(old, splits, 1):
            grad_out, x, weight, _, *settings = mapped(old.args[0].args[:-1])
            mark = old.args[0].meta[MARK]
            same = _is_call(new, masked_conv_dw, (grad_out, x, weight, *given, *mark.only, *settings))
        elif _is_planned(old, names):
            same = _is_call(new, _TWIN.get(old.target), (*mapped(old.args), *given, *old.meta[MARK].arguments()))
        else:
            same = (new.op, new.target, new.args, new.kwargs) == (
                old.op, old.target, mapped(old.args), mapped(old.kwargs))  # fmt: skip
        if not same:
            raise Broken(f"{old.format_node()} became {new.format_node()}")
    if extra := next(rest, None):
        raise Broken(f"{extra.format_node()} was added")


def _is_planned(node: fx.Node, names: set[str]) -> bool:
    mark = node.meta.get(MARK)
    return mark is not None and mark.param in names


def _is_output(node: fx.Node, splits: set[fx.Node], index: int) -> bool:
    return node.target is operator.getitem and node.args[0] in splits and node.args[1] == index


def _is_call(new: fx.Node, target: Any, arguments: tuple[Any, ...]) -> bool:
    return target is not None and new.target is target and tuple(new.args) == arguments
