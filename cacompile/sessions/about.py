"""What a saved state says of the model it was saved from, for those who read it without the model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import is_lazy

from cacompile.version import VERSION

from .why import why

if TYPE_CHECKING:
    from .session import Session

UNSEEN = "in no compiled graph that has run"


def describe(view: Session, before: Mapping[str, Any]) -> dict[str, Any]:
    """Options, versions, what ran, why what is not skipped, and for each parameter its dW FLOPs and why it stays dense.

    Of plain types only. Of several graphs over the same parameters, as after a recompilation for other sizes, the
    newest counts. before: what a loaded state said, whose run this one continues.
    """
    names = {id(param.param): name for name, param in view.params.items()}
    newest = {frozenset(map(id, binding.inputs.values())): binding for binding in view.ran}
    params: dict[str, dict[str, Any]] = {}
    for binding in newest.values():
        called: Mapping[str, str] = {own: names.get(id(param), own) for own, param in binding.inputs.items()}
        reasons = {dense.param: dense.reason for dense in binding.layout.dense}
        for own, flops in binding.flops_by_param.items():
            params[called.get(own, own)] = {"flops": flops, "reason": reasons.get(own, "")}
    reasons_of = why(view)
    unseen: dict[str, Any] = {"flops": 0, "reason": UNSEEN}
    return {
        "options": {} if view.config is None else {k: plain(v) for k, v in asdict(view.config).items()},
        "versions": {"cacompile": VERSION, "torch": str(torch.__version__)},
        "run": _run(view, before.get("run", {})),
        "why": {"weights": reasons_of.line, "nothing": reasons_of.nothing, "families": dict(reasons_of.families)},
        "graphs": len(newest),
        "parameters": {name: params.get(name, unseen) for name in view.params} if newest else {},
    }


def _run(view: Session, before: Mapping[str, str]) -> dict[str, str]:
    """What tells a run from others: model, when it began, device, optimizer; what is not known is not there."""
    model, device = view.model, next((p.param.device for p in view.params.values() if p.param is not None), None)
    found = {
        "model": "" if model is None else _called(model),
        "began": before.get("began", "") or (time.strftime("%Y-%m-%d %H:%M", time.localtime(view.began))
                                             if view.began is not None else ""),
        "device": "" if device is None else device_name(device),
        "optimizer": ", ".join(dict.fromkeys(p.optimizer for p in view.params.values() if p.optimizer))
        or before.get("optimizer", ""),
    }  # fmt: skip
    return {name: text for name, text in found.items() if text}


def _called(model: torch.nn.Module) -> str:
    """Its class, and how many parameters are trained of how many."""
    sizes = [(param.numel(), param.requires_grad) for param in model.parameters() if not is_lazy(param)]
    total, trained = sum(size for size, _ in sizes), sum(size for size, wants in sizes if wants)
    some = "" if trained == total else f", {trained:,} of them trained"
    return f"{type(model).__name__}, {total:,} parameters{some}"


def device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


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
