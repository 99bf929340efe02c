"""Hooks for saved tensors are the user's: nothing of ours goes through them, whatever they do to what does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import OPTIONS, Block, assert_masked, assert_same, compile_all, masks, pin_mixed, train_step
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

import cacompile

Pack = Callable[[Tensor], Any]


def as_bf16(tensor: Tensor) -> Any:
    return tensor.dtype, tensor.to(torch.bfloat16)


def from_bf16(packed: Any) -> Tensor:
    return packed[1].to(packed[0])


def as_rows_of_int8(tensor: Tensor) -> Any:
    flat = tensor.flatten(1)
    scale = flat.abs().amax(1, keepdim=True) / 127
    return (flat / scale).round().to(torch.int8), scale, tensor.shape


def from_rows_of_int8(packed: Any) -> Tensor:
    return (packed[0].float() * packed[1]).view(packed[2])


def only_floats(tensor: Tensor) -> Any:
    assert tensor.is_floating_point(), f"a hook was given {tensor.dtype}"
    return tensor.clone()


HOOKS: dict[str, tuple[Pack, Callable[[Any], Tensor]]] = {
    "bf16": (as_bf16, from_bf16),
    "int8": (as_rows_of_int8, from_rows_of_int8),
    "floats": (only_floats, lambda packed: packed),
    "zeros": (lambda tensor: tensor, torch.zeros_like),
}


def trained_under(hook: str, compiled: tuple[nn.Module, Any], x: list[Tensor]) -> Any:
    """A training step; what the hooks do is the same for any compiler, so it can be compared."""
    model, call = compiled

    def forward(*inputs: Tensor) -> Any:
        with saved_tensors_hooks(*HOOKS[hook]):
            return call(*inputs)

    return train_step((model, forward), x)


@pytest.mark.parametrize("hook", HOOKS)
def test_it_trains_as_with_inductor(hook: str) -> None:
    ours = Block()
    theirs = copy.deepcopy(ours)
    called, expected = compile_all(ours, "convaware"), compile_all(theirs, "inductor")
    x = [torch.randn(8, 32, requires_grad=True)]
    dense = trained_under(hook, (theirs, expected), x)
    assert_same(trained_under(hook, (ours, called), x), dense)
    pin_mixed(cacompile.session(ours))
    assert_masked(trained_under(hook, (ours, called), x), dense, masks(ours))
    assert all(binding.masked_backwards for binding in cacompile.session(ours).bindings)


def test_offloading_to_the_cpu() -> None:
    model = Block()
    call = compile_all(model, "convaware")
    with save_on_cpu():
        call(torch.randn(8, 32)).sum().backward()
    cacompile.session(model).pin(keep=0.0)
    with save_on_cpu():
        out = call(torch.randn(8, 32))
    model.zero_grad()
    out.sum().backward()
    assert not model.up.weight.grad.any() and model.up.bias.grad.any()


@pytest.mark.parametrize(
    "packed", ["all", *(pytest.param(each, marks=pytest.mark.slow) for each in ("donated", "no_static"))]
)
def test_hooks_that_torch_compiles_into_the_graph(packed: str) -> None:
    """By default they get what only the graph sees, but they can be given everything that is saved."""

    def pack(tensor: Tensor) -> Tensor:
        return tensor.to(torch.bfloat16)

    def unpack(tensor: Tensor) -> Tensor:
        return tensor.to(torch.float32)

    hooks = torch.fx.symbolic_trace(pack), torch.fx.symbolic_trace(unpack)
    model = Block()
    call = compile_all(model, "convaware")
    with torch._functorch.config.patch(saved_tensors_hooks_filtering_mode=packed):
        for keep in (1.0, 0.0):
            cacompile.session(model).pin(keep=keep)
            with saved_tensors_hooks(*hooks):
                out = call(torch.randn(8, 32))
            model.zero_grad()
            out.sum().backward()
            assert model.up.weight.grad.any() == (keep == 1.0)


@pytest.fixture(scope="module")
def many() -> list[tuple[nn.Module, Any]]:
    """Models of one graph, every second one skipping all: more than bf16 can tell apart by a number."""
    torch._dynamo.reset()
    models = [Block() for _ in range(300)]

    class Run(nn.Module):  # one code object, and so one graph
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x)

    runs = [
        torch.compile(Run(model), backend="convaware", options={**OPTIONS, "inner": "aot_eager"}) for model in models
    ]
    for i, (model, run) in enumerate(zip(models, runs)):
        run(torch.randn(2, 32))
        cacompile.session(model).pin(keep=float(i % 2))
    return list(zip(models, runs))


CASTS = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.int64, torch.bool]


@pytest.mark.slow
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), casts=st.lists(st.sampled_from(CASTS), max_size=3))
def test_no_hook_changes_which_mask_a_backward_takes(
    many: list[tuple[nn.Module, Any]], data: st.DataObject, casts: list[torch.dtype]
) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(many) - 1), min_size=1, max_size=4, unique=True))
    add = data.draw(st.integers(-3, 3))

    def pack(tensor: Tensor) -> Any:
        packed = tensor
        for dtype in casts:
            packed = packed.to(dtype)
        return packed + add if packed.dtype != torch.bool else packed, tensor.dtype

    outs = []
    for i in chosen:
        with saved_tensors_hooks(pack, lambda packed: packed[0].to(packed[1])):
            outs.append(many[i][1](torch.randn(2, 32)))
    for i, out in zip(chosen, outs):
        block = many[i][0]
        block.zero_grad()
        before = sum(binding.masked_backwards for binding in cacompile.session(block).bindings)
        out.sum().backward()
        after = sum(binding.masked_backwards for binding in cacompile.session(block).bindings)
        assert after - before == (i % 2 == 0), f"model {i}"
        if i % 2 == 0:
            assert not block.up.weight.grad.any()
