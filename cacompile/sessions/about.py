"""What a saved state says of the model it was saved from, for those who read it without the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from cacompile.version import VERSION

if TYPE_CHECKING:
    from .session import Session

UNSEEN = "in no compiled graph that has run"


def describe(view: Session) -> dict[str, Any]:
    """Options, versions, and for each parameter its dW FLOPs and why it stays dense; of plain types only.

    Of several graphs over the same parameters, as after a recompilation for other sizes, the newest counts.
    """
    names = {id(param.param): name for name, param in view.params.items()}
    newest = {frozenset(map(id, binding.inputs.values())): binding for binding in view.bindings}
    params: dict[str, dict[str, Any]] = {}
    for binding in newest.values():
        called: Mapping[str, str] = {own: names.get(id(param), own) for own, param in binding.inputs.items()}
        reasons = {dense.param: dense.reason for dense in binding.layout.dense}
        for own, flops in binding.flops_by_param.items():
            params[called.get(own, own)] = {"flops": flops, "reason": reasons.get(own, "")}
    unseen: dict[str, Any] = {"flops": 0, "reason": UNSEEN}
    return {
        "options": {} if view.config is None else {k: plain(v) for k, v in asdict(view.config).items()},
        "versions": {"cacompile": VERSION, "torch": str(torch.__version__)},
        "graphs": len(newest),
        "parameters": {name: params.get(name, unseen) for name in view.params} if newest else {},
    }


def plain(value: Any) -> Any:
    """A compiler is saved by its name, patterns as one text."""
    if isinstance(value, tuple):
        return ", ".join(value)
    return getattr(value, "__qualname__", type(value).__qualname__) if callable(value) else value


def frozen_lines(since: Mapping[str, int]) -> list[str]:
    """What is frozen since each step, layers that repeat named once."""
    steps = sorted(set(since.values()))
    named = ([name for name, step in since.items() if step == at] for at in steps)
    return [f"frozen since step {at}: {', '.join(names)}" for at, names in zip(steps, named)]
