"""What users do to a compiled model, and that it still trains as with Inductor and still skips."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    Block,
    assert_bits,
    assert_masked,
    assert_same,
    compare,
    compile_all,
    masks,
    pin_mixed,
    train_step,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cacompile
from cacompile.torch_internals import warning_once

pytestmark = pytest.mark.usefixtures("interpreted")

BOTH = ["up.weight", "down.weight"]


def batch() -> list[Tensor]:
    return [torch.randn(8, 32, requires_grad=True)]


@pytest.mark.compiled
def test_graph_breaks() -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Block(), Block()

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    model = compare(Breaks, batch, grouped=[f"{block}.{name}" for block in ("first", "second") for name in BOTH])
    names = {i.layout.grads[0].param for i in cacompile.session(model).bindings}
    assert names == {"first.up.weight", "second.up.weight"}


@pytest.mark.compiled
def test_two_threads() -> None:
    """Inductor writes other code for several threads; the suite itself runs with one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        compare(lambda: Block(64), lambda: [torch.randn(256, 64, requires_grad=True)], grouped=BOTH)
    finally:
        torch.set_num_threads(threads)


def test_fullgraph() -> None:
    compare(Block, batch, grouped=BOTH, fullgraph=True)


@pytest.mark.compiled
@pytest.mark.parametrize(
    "mode",
    ["default", "reduce-overhead", pytest.param("max-autotune-no-cudagraphs", marks=pytest.mark.slow)],
)
def test_modes(mode: str) -> None:
    def compiled(model: nn.Module, backend: str) -> Any:
        return torch.compile(model, backend=backend, mode=mode)  # mode and options exclude each other

    model, replacement = Block(160), None
    replacement = copy.deepcopy(model)
    ours, theirs = (model, compiled(model, "convaware")), (replacement, compiled(replacement, "inductor"))
    x = [torch.randn(8, 160)]
    dense = train_step(theirs, x)
    assert_same(train_step(ours, x), dense)
    pin_mixed(cacompile.session(model))
    assert_masked(train_step(ours, x), dense, masks(model))


@pytest.mark.compiled
def test_without_gradients_it_is_inductor() -> None:
    model = Block()
    replacement = copy.deepcopy(model)
    x = torch.randn(8, 32)
    for context in (torch.no_grad, torch.inference_mode):
        torch._dynamo.reset()
        with context():
            ours, theirs = compile_all(model, "convaware")(x), compile_all(replacement, "inductor")(x)
        assert torch.equal(ours, theirs) and not ours.requires_grad
    assert not cacompile.session(model).bindings


@pytest.mark.compiled
def test_eval_between_epochs() -> None:
    def make() -> nn.Module:
        return nn.Sequential(Block(), nn.BatchNorm1d(32), nn.Dropout(0.0))

    model = make()
    replacement = copy.deepcopy(model)
    ours, theirs = compile_all(model, "convaware"), compile_all(replacement, "inductor")
    x = batch()
    for epoch in range(2):
        model.train(), replacement.train()
        dense, step = train_step((replacement, theirs), x), train_step((model, ours), x)
        (assert_masked(step, dense, masks(model)) if epoch else assert_same(step, dense))
        model.eval(), replacement.eval()
        with torch.no_grad():
            assert torch.equal(ours(*x), theirs(*x))
        assert_bits(ours(*x), theirs(*x), "eval with gradients on")
        pin_mixed(cacompile.session(model))
    assert any(i.masked_backwards for i in cacompile.session(model).bindings)


def test_batch_of_zero_tokens() -> None:
    def empty() -> list[Tensor]:
        return [torch.randn(0, 32, requires_grad=True)]

    model = Block()
    replacement = copy.deepcopy(model)
    ours, theirs = (model, compile_all(model, "convaware")), (replacement, compile_all(replacement, "inductor"))
    dense = train_step(theirs, empty())
    assert_same(train_step(ours, empty()), dense)
    pin_mixed(cacompile.session(model))
    assert_same(train_step(ours, empty()), dense)
    dense = train_step(theirs, x := batch())  # and some tokens after all
    assert_masked(train_step(ours, x), dense, masks(model))


@pytest.mark.compiled
@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
def test_batch_size_changes(dynamic: bool | None) -> None:
    model = Block()
    replacement = copy.deepcopy(model)
    ours = model, compile_all(model, "convaware", dynamic=dynamic)
    theirs = replacement, compile_all(replacement, "inductor", dynamic=dynamic)
    for size in (8, 12, 20, 33):
        x = [torch.randn(size, 32, requires_grad=True)]
        dense = train_step(theirs, x)
        assert_same(train_step(ours, x), dense)
        pin_mixed(cacompile.session(model))
        assert_masked(train_step(ours, x), dense, masks(model))
        cacompile.session(model).unpin()
    graphs = 1 if dynamic else 2
    assert len(cacompile.session(model).bindings) == graphs
    assert sum(i.masked_backwards for i in cacompile.session(model).bindings) == 4


@pytest.mark.parametrize("where", ["inside", "around", "every block"])
def test_activation_checkpointing(where: str) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Block(), Block()

        def forward(self, x: Tensor) -> Tensor:
            if where != "inside":
                return self.second(self.first(x))
            return self.second(checkpoint(self.first, x, use_reentrant=False))

    def compiled(model: nn.Module, backend: str) -> Callable[..., Any]:
        if where != "every block":
            call = compile_all(model, backend)
            return call if where == "inside" else lambda x: checkpoint(call, x, use_reentrant=False)
        parts = [compile_all(part, backend) for part in (model.first, model.second)]
        return lambda x: checkpoint(parts[1], checkpoint(parts[0], x, use_reentrant=False), use_reentrant=False)

    masks = [f"{block}.{name}" for block in ("first", "second") for name in BOTH]
    compare(Checkpointed, batch, grouped=masks, compile_it=compiled)


def test_saved_tensor_hooks() -> None:
    def compiled(model: nn.Module, backend: str) -> Callable[..., Any]:
        call = compile_all(model, backend)

        def run(x: Tensor) -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
                return call(x)

        return run

    compare(Block, batch, grouped=BOTH, compile_it=compiled)


def test_saved_on_cpu() -> None:
    def compiled(model: nn.Module, backend: str) -> Callable[..., Any]:
        call = compile_all(model, backend)

        def run(x: Tensor) -> Tensor:
            with torch.autograd.graph.save_on_cpu():
                return call(x)

        return run

    compare(Block, batch, grouped=BOTH, compile_it=compiled)


@pytest.mark.compiled
def test_compiled_autograd_stays_dense_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model = Block()
    replacement = copy.deepcopy(model)
    ours, theirs = (model, compile_all(model, "convaware")), (replacement, compile_all(replacement, "inductor"))
    x = batch()
    caplog.set_level(logging.WARNING, "cacompile")

    def step(compiled: Any) -> Any:
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="inductor")):
            return train_step(compiled, x)

    dense = step(theirs)
    for _ in range(4):
        assert_same(step(ours), dense)
        cacompile.session(model).pin(keep=0.0)
    said = [record for record in caplog.records if "compiled autograd" in record.getMessage()]
    assert len(said) == 1 and "dense" in said[0].getMessage()
    assert not any(i.masked_backwards for i in cacompile.session(model).bindings)


def test_what_compiled_autograd_did_to_another_model_is_not_said_of_this(caplog: pytest.LogCaptureFixture) -> None:
    other, model, x = Block(), Block(), batch()
    run, alone = (compile_all(each, "convaware", options={"inner": "aot_eager"}) for each in (other, model))
    with torch._dynamo.compiled_autograd._enable(lambda gm: gm):
        train_step((other, run), x)
    warning_once.cache_clear()
    caplog.set_level(logging.WARNING, "cacompile")
    for _ in range(3):
        alone(*x)
    assert not [record for record in caplog.records if record.name.startswith("cacompile")]


def test_compiled_autograd_finds_all_that_it_reads_of_a_frozen_model() -> None:
    model = Block()
    theirs = copy.deepcopy(model)
    theirs.up.requires_grad_(False)
    run = compile_all(model, "convaware", options={"inner": "aot_eager"})
    cacompile.session(model).freeze("up")
    x = batch()
    for _ in range(2):
        with torch._dynamo.compiled_autograd._enable(lambda gm: gm):
            assert_same(train_step((model, run), x), train_step((theirs, theirs), x))
