"""What model-level tests of half-on masks run: the library's products of what is on, each way, and nothing in whole."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from itertools import product

import pytest
import torch
from helpers import compare, mlp
from torch import Tensor, nn

from cacompile.kernels import blocks, dispatch, masked_conv
from cacompile.kernels.dispatch import Choice


class Experts(nn.Module):
    """A batched product whose matrices are experts."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 32, 64) / 6), nn.Parameter(torch.randn(4, 64, 32) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(torch.relu(torch.bmm(x, self.up)), self.down)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "linear": (lambda: mlp(width=64), (8, 64), "multiply_runs"),
    "batched": (Experts, (4, 8, 32), "multiply_runs"),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(4, 64, 3), nn.ReLU(), nn.Conv2d(64, 32, 3)), (2, 4, 8, 8),
                    "convolve_runs"),
}  # fmt: skip
LONG_RUN = {"slices": 0.0, "packed": math.inf}


# experts are never put side by side: their products lie in slices of the result
@pytest.mark.parametrize(("name", "way"), [pair for pair in product(MODELS, LONG_RUN) if pair != ("batched", "packed")])
def test_only_what_is_on_is_computed(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape, operation = MODELS[name]
    home = dispatch if operation == "multiply_runs" else masked_conv
    ran: Counter[str] = Counter()
    run, bundles, everything = getattr(home, operation), blocks.bundles, masked_conv.masked_conv_dw_reference

    def counted(*args: object) -> Tensor:
        ran[operation] += 1
        return run(*args)

    def bundled(*args: object) -> list[list[tuple[int, int]]]:
        found = bundles(*args)
        ran.update("slices" if len(bundle) == 1 else "packed" for bundle in found)
        return found

    def whole(*args: object) -> Tensor:
        ran["everything"] += 1
        return everything(*args)

    monkeypatch.setattr(home, operation, counted)
    monkeypatch.setattr(home, "choose", lambda *args: Choice(LONG_RUN[way], 0.0))
    monkeypatch.setattr(blocks, "bundles", bundled)
    monkeypatch.setattr(masked_conv, "bundles", bundled)
    monkeypatch.setattr(masked_conv, "masked_conv_dw_reference", whole)
    near = ["0.bias", "2.bias"] if name == "convolution" else []
    compare(make, lambda: [torch.randn(shape, requires_grad=True)], near=near)
    assert ran[operation] and not ran["everything"], ran
    assert ran[way], ran
    assert way == "packed" or not ran["packed"], ran
