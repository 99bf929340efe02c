"""Models in which only some parameters train, or some twice, or none."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import Block, assert_masked, assert_same, compare, compile_all, masks, mlp, pin_mixed, train_step
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import cacompile

pytestmark = pytest.mark.usefixtures("interpreted")

BOTH = ["up.weight", "down.weight"]


def batch() -> list[Tensor]:
    return [torch.randn(8, 32, requires_grad=True)]


@pytest.mark.compiled
def test_model_without_parameters() -> None:
    model = nn.Softmax(-1)
    ours, theirs = compile_all(model, "convaware"), compile_all(nn.Softmax(-1), "inductor")
    x = batch()
    assert_same(train_step((model, ours), x), train_step((model, theirs), x))
    session = cacompile.session(model)
    assert session.groups == [] and session.mask.numel() == 0
    session.pin(keep=0.5)
    assert_same(train_step((model, ours), x), train_step((model, theirs), x))


def test_only_vectors() -> None:
    model = nn.Sequential(nn.LayerNorm(32))
    replacement = copy.deepcopy(model)
    x = batch()
    dense = train_step((replacement, compile_all(replacement, "inductor")), x)
    assert_same(train_step((model, compile_all(model, "convaware")), x), dense)
    assert cacompile.session(model).groups == []


@pytest.mark.compiled
def test_frozen_parameters() -> None:
    def make() -> nn.Module:
        model = Block()
        model.up.requires_grad_(False)
        return model

    compare(make, batch, grouped=["down.weight"])


@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 does not see it, with plain Inductor either")
def test_unfreezing_later() -> None:
    model = Block()
    model.up.requires_grad_(False)
    replacement = copy.deepcopy(model)
    ours, theirs = (model, compile_all(model, "convaware")), (replacement, compile_all(replacement, "inductor"))
    x = batch()
    assert_same(train_step(ours, x), train_step(theirs, x))
    model.up.requires_grad_(True), replacement.up.requires_grad_(True)
    dense = train_step(theirs, x)
    assert_same(train_step(ours, x), dense)
    pin_mixed(cacompile.session(model))
    assert_masked(train_step(ours, x), dense, masks(model))
    assert set(masks(model)) == set(BOTH)


def test_adapters() -> None:
    class Adapted(nn.Module):
        """A frozen layer and two small trained ones beside it, as LoRA has it."""

        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(32, 256).requires_grad_(False)
            self.a, self.b = nn.Linear(32, 8, bias=False), nn.Linear(8, 256, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.b(self.a(x)) * 2.0

    compare(Adapted, batch, grouped=["a.weight", "b.weight"])


class Standardized(nn.Conv2d):
    """Every filter of mean 0 and variance 1, times a gain, as NFNet has it."""

    def __init__(self, channels: int, filters: int) -> None:
        super().__init__(channels, filters, 3, padding=1)
        self.gain = nn.Parameter(torch.rand(filters, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.view(1, len(self.weight), -1), None, None, self.gain.view(-1), training=True)
        return F.conv2d(x, weight.view_as(self.weight), self.bias, padding=1)


def test_standardized_weights_take_their_gains_along() -> None:
    """One product makes the gradients of weight and gain: both are zero where it is off."""
    weight, gain = "1.parametrizations.weight.original1", "1.parametrizations.weight.original0"
    make = lambda: nn.Sequential(Standardized(8, 32), weight_norm(nn.Conv2d(32, 48, 3)), nn.Flatten())  # noqa: E731
    masks = ["0.weight", "0.gain", weight, gain]
    model = compare(make, lambda: [torch.randn(2, 8, 5, 5)], grouped=masks, near=["0.bias", "1.bias"])
    session = cacompile.session(model)
    assert session.families == ["0.filters", "1.filters"]
    params = session.params
    for one, other in (("0.weight", "0.gain"), (weight, gain)):
        assert (params[one].on == params[other].on).all()
        assert not params[other].flops.any()


def test_tied_embedding_and_head() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(192, 32)
            self.block = Block()
            self.head = nn.Linear(32, 192, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.block(self.embed(tokens)))

    model = Tied()
    replacement = copy.deepcopy(model)
    tokens = [torch.randint(0, 192, (16, 16))]
    ours, theirs = (model, compile_all(model, "convaware")), (replacement, compile_all(replacement, "inductor"))
    dense = train_step(theirs, tokens)
    assert_same(train_step(ours, tokens), dense)
    cacompile.session(model).pin({"embed.tokens[64:128]": False})
    step = train_step(ours, tokens)
    # only the head's product is skipped, the scatter of the embedding stays
    untied = copy.deepcopy(replacement)
    untied.head.weight = nn.Parameter(untied.embed.weight.detach().clone())
    scatter = train_step((untied, untied), tokens).grads["embed.weight"]
    actual, expected = step.grads.pop("embed.weight"), dense.grads.pop("embed.weight")
    torch.testing.assert_close(actual[64:128], scatter[64:128])
    rest = [*range(64), *range(128, 192)]
    torch.testing.assert_close(actual[rest], expected[rest], rtol=0, atol=1e-6)
    assert not torch.allclose(actual[64:128], expected[64:128])
    assert_masked(step, dense, {})
    assert any(i.masked_backwards for i in cacompile.session(model).bindings)


def test_no_optimizer() -> None:
    """Weights moved by hand: groups stay on, a pin still holds, and nothing is drawn."""
    model = Block()
    replacement = copy.deepcopy(model)
    ours, theirs = (model, compile_all(model, "convaware")), (replacement, compile_all(replacement, "inductor"))
    x = batch()
    for _ in range(3):
        assert_same(train_step(ours, x), train_step(theirs, x))
        with torch.no_grad():
            for p in (*model.parameters(), *replacement.parameters()):
                p -= 0.1 * p.grad
    session = cacompile.session(model)
    assert session.step_count == 0 and session.mask.all()
    pin_mixed(session)
    assert_masked(train_step(ours, x), train_step(theirs, x), masks(model))


def test_half_of_the_outputs_used() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = mlp(), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    model = compare(Two, batch, loss_of=lambda outputs: outputs[0].square().mean())
    assert not model.b.weight.grad.any()
