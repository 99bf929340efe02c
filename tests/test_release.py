"""What stays alive of a compilation: nothing that nobody will ask for again."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from helpers import Block, compile_all, train_step

import cacompile
from cacompile.graph import backward, compiled
from cacompile.torch_internals import TracingContext

TORCHS = {"context", *(f"backward input {i}" for i in range(32))}
"""Held by torch itself, which may compile a backward late: Inductor alone keeps them too."""


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> dict[str, weakref.ref[Any]]:
    """Weak references to what passed by while a graph was compiled."""
    met: dict[str, weakref.ref[Any]] = {}
    joint_pass, versions = compiled.CompiledGraph.joint_pass, backward.BackwardVersions.__init__

    def note_joint(self: Any, gm: Any, inputs: Any) -> Any:
        met.update({"joint module": weakref.ref(gm), "joint graph": weakref.ref(gm.graph)})
        return joint_pass(self, gm, inputs)

    def note_versions(self: Any, gm: Any, inputs: Any, *args: Any, **kwargs: Any) -> None:
        met.update({"backward module": weakref.ref(gm), "context": weakref.ref(TracingContext.try_get())})
        met.update({f"backward input {i}": weakref.ref(value) for i, value in enumerate(inputs)})
        versions(self, gm, inputs, *args, **kwargs)
        met.update({"copy to be masked": weakref.ref(self._maker.module), "maker": weakref.ref(self._maker)})

    monkeypatch.setattr(compiled.CompiledGraph, "joint_pass", note_joint)
    monkeypatch.setattr(backward.BackwardVersions, "__init__", note_versions)
    return met


def alive(met: dict[str, weakref.ref[Any]]) -> set[str]:
    gc.collect()
    return {name for name, ref in met.items() if ref() is not None}


@pytest.mark.thin(2)
@pytest.mark.parametrize("max_truncated", [8, 0])
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_what_survives(met: dict[str, weakref.ref[Any]], inner: str, max_truncated: int) -> None:
    torch._dynamo.reset()
    model = Block()
    options = {"inner": inner, "block_rows": 16, "max_truncated": max_truncated}
    train = model, compile_all(model, "convaware", options=options)
    x = [torch.randn(8, 32, requires_grad=True)]
    train_step(train, x)
    assert len(met) > 8
    before = alive(met)
    assert "maker" in before and "context" in before, "the masked version may still be wanted"
    cacompile.session(model).pin(keep=0.5)
    train_step(train, x)
    after = alive(met)
    # the joint graph is kept for those who look at a compiled model; eagerly the graphs themselves run
    running = {"backward module", "copy to be masked"} if inner == "aot_eager" else set()
    assert after <= {"joint graph"} | TORCHS | running
    holders = {type(holder).__module__ for holder in gc.get_referrers(met["context"]())}
    # of this a truncated version may still be compiled
    source = {"cacompile.graph.source"} if max_truncated else set()
    assert {module for module in holders if module.startswith("cacompile")} == source
    del train, model
    torch._dynamo.reset()
    assert alive(met) == set()
