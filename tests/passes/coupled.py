"""Tiny models given as functions of their parameters, and what is coupled in them.

Expected couplings are written as `size: param.dim param.dim ...` for every axis that two dimensions or more have in
common, all of them: what is not written must not be coupled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import cacompile
from cacompile.explanation.explain import Explanation


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


def couplings(explanation: Explanation) -> list[str]:
    """As in `Case.expected`, sorted."""
    shared = [axis for axis in explanation.axes if len(axis.members) > 1]
    return sorted(f"{axis.size}: {' '.join(sorted(f'{name}.{dim}' for name, dim in axis.members))}" for axis in shared)


def check(case: Case, x: Tensor, untraced: str = "") -> None:
    """untraced: words of the one operation that may not be followed; empty for none."""
    explanation = explained(case, x)
    found = couplings(explanation)
    texts = [text.split(": ") for text in case.expected.split(" | ") if text]
    expected = sorted(f"{size}: {' '.join(sorted(members.split()))}" for size, members in texts)
    assert found == expected, f"{found} != {expected}; untraced {dict(explanation.untraced)}"
    assert [untraced in reason for reason in explanation.untraced] == [True] * bool(untraced), explanation.untraced
