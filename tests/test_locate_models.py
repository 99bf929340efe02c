"""What is found in real models: which weights are masked, which stay dense and why, and that the numbers hold."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from helpers import compare as compare_models
from helpers import compile_all, masks, mlp, square_mean
from torch import Tensor, fx, nn
from torch.nn.utils.parametrizations import weight_norm

from cacompile.config import Config
from cacompile.graph import compiled as graphs
from cacompile.graph.handle import erase_handle
from cacompile.passes import locate, mask_weight_grads, verify
from cacompile.passes.plan import Param, Plan

pytestmark = pytest.mark.usefixtures("interpreted")


def small_blocks(model: nn.Module, backend: str, **settings: Any) -> Callable[..., Any]:
    """What is looked at here are single layers: of rows that lead nowhere a group has many."""
    options = {"options": {"block_rows": 4}} if backend == "convaware" else {}
    return compile_all(model, backend, **options, **settings)


compare = functools.partial(compare_models, compile_it=small_blocks)


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
        grouped=["0.weight", "3.weight"],
        stays=dict.fromkeys(vectors, "cheap reduction"),
    )


@pytest.mark.compiled
def test_linear_under_autocast() -> None:
    class Autocast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = mlp()

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.mlp(x)

    # a product of fewer rows may be summed in another order, and bfloat16 keeps 8 bits
    compare(Autocast, normal(2, 4, 32), grouped=["mlp.0.weight", "mlp.3.weight"], rtol=1e-2)


def test_float64() -> None:
    compare(lambda: mlp(dtype=torch.float64), lambda: [torch.randn(8, 32, dtype=torch.float64)],
            grouped=["0.weight", "3.weight"], rtol=1e-12)  # fmt: skip


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


@pytest.mark.compiled
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name: str) -> None:
    layer, inputs = CONVOLUTIONS[name]
    # a bias gradient leaves the library's call, which would compute all of dW with it
    near = ["0.bias"] if layer().bias is not None else []
    compare(lambda: nn.Sequential(layer()), inputs, grouped=["0.weight"], near=near)


def test_grouped_transposed_convolution_stays_dense() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.ConvTranspose2d(32, 32, 3, groups=2), nn.Conv2d(32, 32, 3, bias=False))

    stays = {"0.weight": "transposed convolution with 2 groups"}
    compare(make, normal(2, 32, 5, 5), grouped=["1.weight"], stays=stays)


@pytest.mark.compiled
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
    compare(Residual, normal(2, 3, 6, 6), grouped=["stem.weight", "inside.weight", "head.weight"], stays=stays)


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
    compare(lambda: Function(function, *shapes), normal(*x), grouped=[f"w{i}" for i in range(len(shapes))])


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

    model = compare(make, normal(8, 32), grouped=["w0"])
    assert model.w0.is_contiguous() == (stored == "contiguous")


def test_weights_joined_by_cat_stay_dense() -> None:
    def function(x: Tensor, a: Tensor, b: Tensor, qkv: Tensor) -> Tensor:
        both = F.linear(x, torch.cat([a, b]))
        q, k, v = qkv.chunk(3)
        return torch.cat([both, F.linear(x, q) * F.linear(x, k) + F.linear(x, v)], -1)

    model = lambda: Function(function, (32, 32), (48, 32), (96, 32))  # noqa: E731
    stays = dict.fromkeys(["w0", "w1"], "makes other gradients as well")
    compare(model, normal(8, 32), grouped=["w2"], stays=stays)


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
    compare(lambda: Function(SLICED[name], (96, 32)), normal(8, 32), grouped=["w0"])


def test_slices_where_no_block_ends_are_cut_the_other_way() -> None:
    def function(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return F.linear(x, w[:37]).sum(-1, keepdim=True) + F.linear(x, w[37:]).square().sum(-1, keepdim=True) + x @ v

    model = lambda: Function(function, (80, 32), (32, 32))  # noqa: E731
    found = compare(model, normal(8, 32), grouped=["w0", "w1"])
    assert masks(found)["w0"][0] == 1


def test_empty_weights_beside_others() -> None:
    """No classes yet, or a branch of no width: empty by itself, and part of a product that others share."""

    def function(x: Tensor, w: Tensor, none: Tensor, thin: Tensor, back: Tensor) -> Tensor:
        return torch.cat([F.linear(x, w), F.linear(x, none)], 1) + F.linear(F.linear(x, thin), back)

    model = lambda: Function(function, (64, 32), (0, 32), (0, 32), (64, 0))  # noqa: E731
    compare(model, normal(8, 32), grouped=["w0"], stays=dict.fromkeys(["w1", "w2", "w3"], "empty"))


def test_weight_used_twice() -> None:
    compare(lambda: Function(lambda x, w: F.linear(F.linear(x, w).relu(), w), (32, 32)), normal(8, 32), grouped=["w0"])
    # once as it is and once transposed: its rows are rows of one product and columns of the other
    compare(lambda: Function(lambda x, w: F.linear(x, w).relu() @ w, (48, 32)), normal(8, 32), grouped=["w0"])


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
    compare(Tokens, lambda: [torch.randint(0, 40, (4, 6))], grouped=["head.weight"], stays=stays)


def test_what_a_product_does_not_make_stays_dense() -> None:
    def function(x: Tensor, scale: Tensor, table: Tensor, unused: Tensor, w: Tensor) -> Tensor:
        return F.linear(x * scale + table.sum(0), w) + 0 * unused.sum()

    model = lambda: Function(function, (8, 32), (32, 32), (32, 32), (48, 32))  # noqa: E731
    compare(model, normal(8, 32), grouped=["w3"], stays={"w0": "used 3 times", "w1": "broadcast", "w2": "broadcast"})


def test_a_product_that_is_two_gradients_stays_dense() -> None:
    """One node in two places of the output: masked for one parameter, it would be wrong for the other."""

    def function(x: Tensor, w: Tensor, v: Tensor, u: Tensor) -> Tensor:
        return F.linear(F.linear(x, w + v), u)

    model = lambda: Function(function, (48, 32), (48, 32), (32, 48))  # noqa: E731
    compare(model, normal(8, 32), grouped=["w2"], stays={"w0": "used 2 times", "w1": "used 2 times"})


def test_a_gradient_that_is_also_the_inputs_stays_dense() -> None:
    """As for a position embedding right after a graph break."""

    def function(x: Tensor, position: Tensor, w: Tensor) -> Tensor:
        return F.linear(x + position, w)

    inputs = lambda: [torch.randn(8, 32, requires_grad=True)]  # noqa: E731
    compare(lambda: Function(function, (8, 32), (48, 32)), inputs, grouped=["w1"], stays={"w0": "used 2 times"})


class Standardized(nn.Conv2d):
    """Filters of mean 0 and variance 1, times a gain."""

    def __init__(self) -> None:
        super().__init__(4, 32, 3)
        self.gain = nn.Parameter(torch.rand(32, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), correction=0, keepdim=True)
        return F.conv2d(x, self.gain * (self.weight - mean) * (variance + 1e-5).rsqrt(), self.bias)


class BatchNormalized(Standardized):
    """The same, as timm does it."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.view(1, 32, -1)
        rows = F.batch_norm(rows, None, None, weight=self.gain.view(-1), training=True, eps=1e-5)
        return F.conv2d(x, rows.view_as(self.weight), self.bias)


def scaled(x: Tensor, w: Tensor, gain: Tensor) -> Tensor:
    return F.linear(F.linear(x, gain * w).relu(), gain * w)


V, G = (f"parametrizations.weight.original{i}" for i in (1, 0))

CHAINS = {
    "weight norm, linear": (lambda: weight_norm(nn.Linear(32, 48)), (8, 32), V, [G]),
    "weight norm, columns": (lambda: weight_norm(nn.Linear(32, 48), dim=1), (8, 32), V, [G]),
    "weight norm, conv": (lambda: weight_norm(nn.Conv2d(4, 32, 3)), (2, 4, 8, 8), V, [G]),
    "standardized conv": (Standardized, (2, 4, 8, 8), "weight", ["gain"]),
    "standardized by batch norm": (BatchNormalized, (2, 4, 8, 8), "weight", ["gain"]),
    "normalized rows": (lambda: Function(lambda x, w: F.linear(x, F.normalize(w)), (48, 32)), (8, 32), "w0", []),
    "scale, used twice": (lambda: Function(scaled, (32, 32), (32, 1)), (8, 32), "w0", ["w1"]),
    "scale of one dimension": (
        lambda: Function(lambda x, w, g: F.linear(x, w * g.view(-1, 1)), (48, 32), (48,)), (8, 32), "w0", ["w1"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_gradients_that_share_a_product(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, x, leader, followers = CHAINS[name]
    plan, dense, masked = backward_by_hand(make(), [torch.randn(x, requires_grad=True)], monkeypatch)
    assert {g.param.name: g.follows for g in plan.grads} == {leader: "", **dict.fromkeys(followers, leader)}
    assert set(plan.masked or ()) == {leader, *followers}
    dims = {g.param.name: g.dim for g in plan.grads}
    for param, expected in dense.items():
        if param not in dims:
            torch.testing.assert_close(masked[param], expected)
            continue
        ours, expected = (grad.movedim(dims[param], 0) for grad in (masked[param], expected))
        assert not ours[:16].any() and expected[:16].any()
        torch.testing.assert_close(ours[16:], expected[16:])


def test_scale_of_a_whole_weight_keeps_it_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Function(lambda x, w, g, v: F.linear(x, w * g) @ v, (48, 32), (1,), (48, 32))
    plan, *_ = backward_by_hand(model, [torch.randn(8, 32)], monkeypatch)
    assert [g.param.name for g in plan.grads] == ["w2"]
    assert "gradient of w1" in next(skip.reason for skip in plan.dense if skip.param == "w0")
    assert plan.flops == 2 * 8 * 48 * 32 * 2


def test_grouped_mm(monkeypatch: pytest.MonkeyPatch) -> None:
    def experts(x: Tensor, w: Tensor) -> Tensor:
        offs = torch.tensor([8, 8, 24, 32], dtype=torch.int32)
        return torch._grouped_mm(x.bfloat16(), w.mT, offs=offs)

    model = Function(experts, (4, 48, 32), dtype=torch.bfloat16)
    plan, dense, masked = backward_by_hand(model, [torch.randn(32, 32)], monkeypatch, block=2)
    [grad] = plan.grads
    assert (grad.kind, plan.masked, grad.flops) == ("grouped", ("w0",), 2 * 32 * 48 * 32)
    assert not masked["w0"][:2].any() and dense["w0"][:1].any()
    assert torch.equal(masked["w0"][2:], dense["w0"][2:])


def backward_by_hand(
    model: nn.Module, inputs: list[Tensor], monkeypatch: pytest.MonkeyPatch, block: int = 16
) -> tuple[Plan, dict[str, Tensor], dict[str, Tensor]]:
    """The plan, with blocks that are set here; all gradients dense, and with the first block of each weight off.

    The backward graph is AOTAutograd's own, and run as it is. With all blocks on it gives the same bits.
    """

    def plan_by_hand(params: tuple[Param, ...], **_: Any) -> Plan:
        plan = locate(Plan(params=params))
        first_flags = itertools.count(step=1000)
        return replace(
            plan, grads=tuple(replace(g, block=block, first_flag=next(first_flags), others=()) for g in plan.grads)
        )

    def eager(gm: fx.GraphModule, _inputs: Any, **_settings: Any) -> Callable[[list[Any]], Any]:
        return make_boxed_func(gm.forward)

    def versions(gm: fx.GraphModule, inputs: Any, settings: Any, *, handle: int, plan: Plan, **_: Any) -> Any:
        first_flag = erase_handle(gm, handle)
        before, masked = copy.deepcopy(gm.graph), fx.GraphModule(gm, copy.deepcopy(gm.graph))
        plans.append(mask_weight_grads(masked, plan))
        verify(before, masked.graph, plans[-1].masked or ())

        def run(args: list[Any]) -> list[Any]:
            args.pop(handle)
            flags = torch.ones(1000 * len(plan.grads), dtype=torch.uint8)
            if modes[0] == "off":
                flags[[grad.first_flag for grad in plan.grads]] = 0
            every = list(gm(*args) if modes[0] == "dense" else masked(*args, flags))
            if first_flag is not None:
                every.insert(first_flag, None)
            return every

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        _, compiled = graphs.compile_graph(gm, inputs, Config(), {}, compile_inner=eager)
        return lambda *args: compiled(*args, 0)

    plans: list[Plan] = []
    modes = ["dense", "on", "off"]
    monkeypatch.setattr(graphs, "make_plan", plan_by_hand)
    monkeypatch.setattr(graphs, "BackwardVersions", versions)
    call = torch.compile(model, backend=backend)
    results = []
    while modes:
        model.zero_grad()
        square_mean(call(*inputs)).backward()
        results.append({name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None})
        modes.pop(0)
    dense, on, off = results
    for name in {grad.param.name for grad in plans[0].grads}:
        assert torch.equal(on[name], dense[name]), name
    return plans[0], dense, off
