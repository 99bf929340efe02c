"""Gradients that the user takes in hand are whole, whatever the mask says; those that are accumulated are masked."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import OPTIONS, Block, assert_bits
from torch import Tensor, nn

import cacompile


@pytest.fixture(autouse=True)
def not_donated() -> Iterator[None]:
    """torch donates saved buffers, which forbids retain_graph."""
    with torch._functorch.config.patch(donated_buffer=False):
        yield


def pair() -> tuple[nn.Module, Any, nn.Module, Any]:
    """Our model, all of it skipped, and the same with Inductor."""
    ours = Block()
    theirs = copy.deepcopy(ours)
    call = torch.compile(ours, backend="convaware", options=OPTIONS)
    call(torch.randn(8, 32)).sum().backward()
    ours.zero_grad()
    cacompile.session(ours).pin(keep=0.0)
    return ours, call, theirs, torch.compile(theirs, backend="inductor")


READS = {
    "one weight": lambda m: [m.down.weight],
    "the other weight": lambda m: [m.up.weight],
    "a bias and a weight": lambda m: [m.up.bias, m.down.weight],
    "all": lambda m: list(m.parameters()),
}


@pytest.mark.parametrize("read", READS)
def test_what_autograd_grad_gives_is_whole(read: str, caplog: pytest.LogCaptureFixture) -> None:
    ours, call, theirs, expected = pair()
    x = torch.randn(8, 32)
    with caplog.at_level(logging.WARNING):
        found = torch.autograd.grad(call(x).square().sum(), READS[read](ours))
    for actual, dense in zip(found, torch.autograd.grad(expected(x).square().sum(), READS[read](theirs))):
        assert_bits(actual, dense, read)
        assert actual.any()
    call(x).square().sum().backward()
    assert not ours.up.weight.grad.any(), "what is accumulated is skipped as ever"


def test_adaptive_loss_weights() -> None:
    """The last layer's gradients of two losses, then a backward of their weighted sum, as VQGAN and GradNorm do."""
    ours, call, theirs, expected = pair()
    x = torch.randn(8, 32)

    def losses(out: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        first, second = out[:, :16].square().mean(), out[:, 16:].abs().mean()
        a, b = (torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (first, second))
        return first + a / b * second, a / b

    (loss, weight), (dense_loss, dense_weight) = (
        losses(call(x), ours.down.weight),
        losses(expected(x), theirs.down.weight),
    )
    assert torch.equal(weight, dense_weight) and weight > 0
    loss.backward()
    dense_loss.backward()
    assert not ours.down.weight.grad.any() and theirs.down.weight.grad.any()
    assert_bits(ours.down.bias.grad, theirs.down.bias.grad, "bias")


def test_gradients_of_inputs_alone_need_no_weights() -> None:
    ours, call, _theirs, expected = pair()
    x = torch.randn(8, 32, requires_grad=True)
    masked = sum(binding.masked_backwards for binding in cacompile.session(ours).bindings)
    (found,) = torch.autograd.grad(call(x).square().sum(), x)
    (dense,) = torch.autograd.grad(expected(x).square().sum(), x)
    assert_bits(found, dense, "input")
    assert sum(binding.masked_backwards for binding in cacompile.session(ours).bindings) == masked + 1


def test_backward_into_some_leaves_accumulates() -> None:
    ours, call, *_ = pair()
    call(torch.randn(8, 32)).square().sum().backward(inputs=[ours.down.weight])
    assert not ours.down.weight.grad.any() and ours.up.weight.grad is None
