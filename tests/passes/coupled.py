"""Tiny models given as functions of their parameters, and what is coupled in them.

Expected couplings are written as `size: param.dim param.dim ...` for every axis that two dimensions or more have in
common, all of them: what is not written must not be coupled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._inductor.decomposition import select_decomp_table

import cacompile
from cacompile import passes
from cacompile.explanation.explain import Explanation
from cacompile.passes.plan import Plan


class Case(NamedTuple):
    """A function of a module with these parameters and of an input, and the couplings that it makes."""

    function: Callable[[Any, Tensor], Any]
    shapes: dict[str, tuple[int, ...]]
    expected: str


class Function(nn.Module):
    """A function of parameters, which are this module's, and of the input."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.function = case.function
        for name, shape in case.shapes.items():
            setattr(self, name, nn.Parameter(torch.rand(shape)))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def explained(case: Case, x: Tensor) -> Explanation:
    return cacompile.explain(Function(case), x, options={"block_rows": 2})


def planned(case: Case, x: Tensor) -> Plan:
    """Without Dynamo and a partition: the joint graph alone."""
    with contextlib.ExitStack() as stack:
        joint = aot_export_joint_with_descriptors(stack, Function(case), (x,), decompositions=select_decomp_table())
        return passes.find_plan(joint.graph_module, block_rows=2)


def couplings(found: Explanation | Plan) -> list[str]:
    """As in `Case.expected`, sorted."""
    shared = [axis for axis in found.axes if len(axis.members) > 1]
    return sorted(f"{axis.size}: {' '.join(sorted(f'{name}.{dim}' for name, dim in axis.members))}" for axis in shared)


def check(
    case: Case, x: Tensor, untraced: str = "", look: Callable[[Case, Tensor], Explanation | Plan] = planned
) -> None:
    """untraced: words of the one operation that may not be followed; empty for none."""
    looked = look(case, x)
    found, ends = couplings(looked), dict(looked.untraced)
    texts = [text.split(": ") for text in case.expected.split(" | ") if text]
    expected = sorted(f"{size}: {' '.join(sorted(members.split()))}" for size, members in texts)
    assert found == expected, f"{found} != {expected}; untraced {ends}"
    assert [untraced in reason for reason in ends] == [True] * bool(untraced), ends
