"""What is found in real models: which weights are guarded, which stay dense and why, and that the numbers hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from helpers import compare, mlp
from torch import Tensor, nn


class Function(nn.Module):
    """Parameters of the given shapes as w0, w1, ... and a function of them and the input."""

    def __init__(
        self, function: Callable[..., Tensor], *shapes: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.function = function
        for i, shape in enumerate(shapes):
            self.register_parameter(f"w{i}", nn.Parameter(torch.randn(shape, dtype=dtype) / shape[-1] ** 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parameters())


def normal(*shape: int, grad: bool = True) -> Callable[[], list[Tensor]]:
    return lambda: [torch.randn(shape, requires_grad=grad)]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(8, 32), (2, 4, 32), (2, 2, 2, 32)], ids=str)
def test_linear(shape: tuple[int, ...], bias: bool) -> None:
    vectors = ["1.weight", "1.bias", *(["0.bias", "3.bias"] if bias else [])]
    compare(
        lambda: mlp(bias=bias),
        normal(*shape),
        guards=["0.weight", "3.weight"],
        stays=dict.fromkeys(vectors, "cheap reduction"),
    )


def test_linear_under_autocast() -> None:
    class Autocast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = mlp()

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.mlp(x)

    # a product of fewer rows may be summed in another order, and bfloat16 keeps 8 bits
    compare(Autocast, normal(2, 4, 32), guards=["mlp.0.weight", "mlp.3.weight"], rtol=1e-2)


def test_float64() -> None:
    compare(lambda: mlp(dtype=torch.float64), lambda: [torch.randn(8, 32, dtype=torch.float64)],
            guards=["0.weight", "3.weight"], rtol=1e-12)  # fmt: skip


CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(4, 32, 3), normal(2, 4, 9)),
    "2d": (lambda: nn.Conv2d(4, 32, 3, stride=2, padding=1), normal(2, 4, 8, 8)),
    "2d without dX": (lambda: nn.Conv2d(4, 32, 3, bias=False), normal(2, 4, 8, 8, grad=False)),
    "2d channels last": (
        lambda: nn.Conv2d(4, 32, 3, dilation=2).to(memory_format=torch.channels_last),
        lambda: [torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last).requires_grad_()],
    ),
    "3d": (lambda: nn.Conv3d(2, 32, 2), normal(2, 2, 4, 4, 4)),
    "grouped": (lambda: nn.Conv2d(8, 64, 3, groups=2), normal(2, 8, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(32, 32, 3, groups=32, padding=1), normal(2, 32, 6, 6)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 32, 3), normal(2, 4, 6)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 32, 3, stride=2, output_padding=1), normal(2, 4, 5, 5)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name: str) -> None:
    layer, inputs = CONVOLUTIONS[name]
    # a bias gradient leaves the library's call, which would compute all of dW with it
    near = ["0.bias"] if layer().bias is not None else []
    compare(lambda: nn.Sequential(layer()), inputs, guards=["0.weight"], near=near)


def test_grouped_transposed_convolution_stays_dense() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.ConvTranspose2d(32, 32, 3, groups=2), nn.Conv2d(32, 32, 3, bias=False))

    stays = {"0.weight": "transposed convolution with 2 groups"}
    compare(make, normal(2, 32, 5, 5), guards=["1.weight"], stays=stays)


def test_batch_norm_and_residual_stream() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 32, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(32)
            self.inside = nn.Conv2d(32, 32, 3, padding=1, bias=False)
            self.head = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.norm(self.stem(x)))
            return self.head((x + self.inside(x)).mean((2, 3)))

    stays = {"norm.weight": "cheap reduction", "norm.bias": "cheap reduction", "head.bias": "cheap reduction"}
    compare(Residual, normal(2, 3, 6, 6), guards=["stem.weight", "inside.weight", "head.weight"], stays=stays)


PRODUCTS = {
    "x @ w": (lambda x, w: x @ w, [(32, 48)], (8, 32)),
    "x @ w of rank 3": (lambda x, w: torch.relu(x @ w), [(32, 48)], (2, 4, 32)),
    "x @ w.t()": (lambda x, w: x @ w.t(), [(48, 32)], (8, 32)),
    "w @ x": (lambda x, w: w @ x, [(48, 32)], (32, 8)),
    "w.t() @ x": (lambda x, w: w.t() @ x, [(32, 48)], (32, 8)),
    "bmm": (lambda x, w: torch.bmm(x, w), [(4, 32, 16)], (4, 8, 32)),
    "einsum experts": (lambda x, w, v: torch.einsum("ebh,eho->ebo", torch.einsum("bi,eih->ebh", x, w).relu(), v),
                       [(4, 32, 16), (4, 16, 32)], (8, 32)),
    "einsum gate": (lambda x, w: torch.einsum("bi,eoi,be->bo", x, w, x[:, :4].softmax(-1)), [(4, 16, 32)], (8, 32)),
    "einsum heads": (lambda x, w: torch.einsum("btd,hkd->bthk", x, w), [(4, 16, 32)], (2, 4, 32)),
    "bilinear": (lambda x, w: torch.einsum("bi,ij,bj->b", x, w, x), [(32, 32)], (8, 32)),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_every_shape(name: str) -> None:
    function, shapes, x = PRODUCTS[name]
    compare(lambda: Function(function, *shapes), normal(*x), guards=[f"w{i}" for i in range(len(shapes))])


ODD = {
    "contiguous": lambda w: w,
    "one permute": lambda w: w.t().contiguous().t(),
}


@pytest.mark.parametrize("use", ["linear", "matmul"])
@pytest.mark.parametrize("stored", ODD)
def test_weight_stored_transposed(stored: str, use: str) -> None:
    def make() -> nn.Module:
        model = Function(F.linear if use == "linear" else torch.matmul, (48, 32) if use == "linear" else (32, 48))
        model.w0 = nn.Parameter(ODD[stored](model.w0.detach()))
        return model

    model = compare(make, normal(8, 32), guards=["w0"])
    assert model.w0.is_contiguous() == (stored == "contiguous")


def test_weights_joined_by_cat_stay_dense() -> None:
    def function(x: Tensor, a: Tensor, b: Tensor, qkv: Tensor) -> Tensor:
        both = F.linear(x, torch.cat([a, b]))
        q, k, v = qkv.chunk(3)
        return torch.cat([both, F.linear(x, q) * F.linear(x, k) + F.linear(x, v)], -1)

    model = lambda: Function(function, (32, 32), (48, 32), (96, 32))  # noqa: E731
    stays = dict.fromkeys(["w0", "w1"], "makes other gradients as well")
    compare(model, normal(8, 32), guards=["w2"], stays=stays)


SLICED = {
    "chunk": lambda x, w: sum(F.linear(x, part).square() for part in w.chunk(3)),
    "slices": lambda x, w: F.linear(x, w[:48]).sum(-1) + F.linear(x, w[48:]).square().sum(-1),
    "one part used": lambda x, w: F.linear(x, w[32:64]),
    "split of the result": lambda x, w: sum(p.square() for p in F.linear(x, w).split(32, -1)),
    "stacked": lambda x, w: torch.einsum("bi,noi->nbo", x, w.view(3, 32, 32)).relu(),
    "unbound": lambda x, w: sum(F.linear(x, p).square() for p in w.view(3, 32, 32).unbind(0)),
}


@pytest.mark.parametrize("name", SLICED)
def test_weight_sliced_before_its_use(name: str) -> None:
    compare(lambda: Function(SLICED[name], (96, 32)), normal(8, 32), guards=["w0"])


def test_slices_where_no_block_ends_stay_dense() -> None:
    def function(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return F.linear(x, w[:37]).sum(-1, keepdim=True) + F.linear(x, w[37:]).square().sum(-1, keepdim=True) + x @ v

    model = lambda: Function(function, (80, 32), (32, 32))  # noqa: E731
    compare(model, normal(8, 32), guards=["w1"], stays={"w0": "meet at rows 37"})


def test_weight_used_twice() -> None:
    compare(lambda: Function(lambda x, w: F.linear(F.linear(x, w).relu(), w), (32, 32)), normal(8, 32), guards=["w0"])
    # once as it is and once transposed: its rows are rows of one product and columns of the other
    compare(lambda: Function(lambda x, w: F.linear(x, w).relu() @ w, (48, 32)), normal(8, 32), guards=["w0"])


def test_embedding_stays_dense() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(40, 32)
            self.bag = nn.EmbeddingBag(40, 32)
            self.head = nn.Linear(32, 48)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embed(tokens).sum(1) + self.bag(tokens))

    stays = {"embed.weight": "an embedding", "bag.weight": "an embedding"}
    compare(Tokens, lambda: [torch.randint(0, 40, (4, 6))], guards=["head.weight"], stays=stays)


def test_what_a_product_does_not_make_stays_dense() -> None:
    def function(x: Tensor, scale: Tensor, table: Tensor, unused: Tensor, w: Tensor) -> Tensor:
        return F.linear(x * scale + table.sum(0), w) + 0 * unused.sum()

    model = lambda: Function(function, (8, 32), (32, 32), (32, 32), (48, 32))  # noqa: E731
    compare(model, normal(8, 32), guards=["w3"], stays={"w0": "used 3 times", "w1": "broadcast", "w2": "broadcast"})


def test_a_product_that_is_two_gradients_stays_dense() -> None:
    """One node in two places of the output: masked for one parameter, it would be wrong for the other."""

    def function(x: Tensor, w: Tensor, v: Tensor, u: Tensor) -> Tensor:
        return F.linear(F.linear(x, w + v), u)

    model = lambda: Function(function, (48, 32), (48, 32), (32, 48))  # noqa: E731
    compare(model, normal(8, 32), guards=["w2"], stays={"w0": "used 2 times", "w1": "used 2 times"})


def test_a_gradient_that_is_also_the_inputs_stays_dense() -> None:
    """As for a position embedding right after a graph break."""

    def function(x: Tensor, position: Tensor, w: Tensor) -> Tensor:
        return F.linear(x + position, w)

    inputs = lambda: [torch.randn(8, 32, requires_grad=True)]  # noqa: E731
    compare(lambda: Function(function, (8, 32), (48, 32)), inputs, guards=["w1"], stays={"w0": "used 2 times"})
