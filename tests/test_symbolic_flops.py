"""FLOPs where sizes are symbolic: each call counts with the sizes that it has."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import OPTIONS, pin_mixed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import cacompile
from cacompile.layout import Monomial
from cacompile.passes.flops import Flops, at_sizes, split

EAGER = {**OPTIONS, "inner": "aot_eager"}


class Pooled(nn.Module):
    """Token-wise layers, whose FLOPs go with batch times length, and a pooled head, whose go with the batch."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.pool, self.head = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.pool((x + self.down(F.gelu(self.up(x))))[:, 0])))

    def true_flops(self, name: str, batch: int, length: int) -> int:
        rows = batch * (length if name in ("up", "down") else 1)
        return 2 * rows * self.get_parameter(f"{name}.weight").numel()


LAYERS = ("up", "down", "pool", "head")


def counted_right(model: Pooled, run: Any, sizes: Sequence[tuple[int, int]]) -> None:
    """Every call of these (batch, length) adds what it has, in all and left out."""
    session = cacompile.session(model)
    for batch, length in sizes:
        all_before, saved_before = session.flops
        model.zero_grad()
        run(torch.randn(batch, length, 32)).square().mean().backward()
        all_now, saved_now = session.flops
        true = {name: model.true_flops(name, batch, length) for name in LAYERS}
        off = {name: 1.0 - session.params[f"{name}.weight"].on.mean() for name in LAYERS}
        assert all_now - all_before == sum(true.values())
        assert saved_now - saved_before == sum(off[name] * true[name] for name in LAYERS)


@pytest.mark.parametrize("order", [[48, 40, 40, 20, 20], [20, 24, 40, 40, 48]], ids=str)
def test_lengths_that_vary(order: list[int]) -> None:
    """As with dynamic padding: the first length is compiled by itself, the second makes the length symbolic."""
    model = Pooled()
    run = torch.compile(model, backend="convaware", options=EAGER)
    counted_right(model, run, [(4, length) for length in order])
    assert cacompile.session(model).flops[1] == 0
    pin_mixed(cacompile.session(model))
    counted_right(model, run, [(4, length) for length in order])
    assert cacompile.session(model).flops[1] > 0
    rows = {row.param: row.flops for row in cacompile.explain(model).rows}
    seen = [*order[1:], *order]  # the graph of the first length has run it once
    expected = sum(model.true_flops("up", 4, n) for n in seen) / len(seen)
    assert rows["up.weight"] == pytest.approx(expected, rel=1e-6)


def conv(size: int, kernel: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - kernel) // stride + 1


class Strided(nn.Module):
    """Pictures of any size behind strides; of the frozen layer the backward has neither input nor output."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, stride=2, padding=1).requires_grad_(False)
        self.b, self.c = nn.Conv2d(8, 16, 3, stride=2), nn.Conv2d(16, 16, 3, stride=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x))).mean((2, 3))

    def true_flops(self, batch: int, height: int, width: int) -> int:
        b = [conv(conv(n, 3, 2, 1), 3, 2, 0) for n in (height, width)]
        c = [conv(n, 3, 3, 1) for n in b]
        return 2 * batch * (b[0] * b[1] * 16 * 8 * 9 + c[0] * c[1] * 16 * 16 * 9)


class Padded(nn.Module):
    """Length is padded to a multiple of 8, as windows are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x[:, 0], (0, 0, 0, (8 - x.shape[2] % 8) % 8))
        return self.b(self.a(x.view(x.shape[0], -1, 8, 8)).mean(2))

    def true_flops(self, batch: int, _: int, length: int) -> int:
        windows = -(-length // 8)
        return 2 * batch * (8 * windows + windows) * 8 * 16


@pytest.mark.thin(2)
@pytest.mark.parametrize("dynamic", [None, True], ids=["found", "asked for"])
@pytest.mark.parametrize("kind", [Strided, Padded])
def test_sizes_that_are_computed_of_others(kind: type[Strided | Padded], dynamic: bool | None) -> None:
    """No input of the backward has (s - 1) // 2 as a size, but some have (s - 1) // 2 + 1, or s."""
    model = kind()
    run = torch.compile(model, backend="convaware", options=EAGER, dynamic=dynamic)
    channels, width = (3, None) if kind is Strided else (1, 8)
    session = cacompile.session(model)
    for batch, height, length in [(2, 32, 32), (3, 40, 33), (2, 65, 64), (4, 100, 31)]:
        before = session.flops[0]
        x = torch.randn(batch, channels, length if width else height, width or length)
        run(x).square().mean().backward()
        assert session.flops[0] - before == model.true_flops(batch, height, length)


@pytest.fixture(scope="module")
def dynamic() -> tuple[Pooled, Any]:
    model = Pooled()
    run = torch.compile(model, backend="convaware", options=EAGER, dynamic=True)
    run(torch.randn(3, 5, 32)).sum().backward()
    return model, run


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.tuples(st.integers(2, 40), st.integers(2, 70)), min_size=1, max_size=4), seed=st.integers(0, 99)
)
def test_any_sizes(dynamic: tuple[Pooled, Any], sizes: list[tuple[int, int]], seed: int) -> None:
    model, run = dynamic
    cacompile.session(model).pin(keep=0.5, seed=seed)
    counted_right(model, run, sizes)


class Picks(nn.Module):
    """An expert that sees the tokens whose first entry is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.expert, self.out = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        chosen = torch.nonzero(x[:, 0] > 0).squeeze(-1)
        hidden = x.new_zeros(len(x), 64).index_add(0, chosen, self.expert(x[chosen]))
        return self.out(hidden)


@pytest.mark.parametrize("picked", [0, 1, 6, 16])
def test_explain_counts_the_sizes_of_its_example(picked: int) -> None:
    x = torch.randn(16, 32)
    x[:, 0] = torch.where(torch.arange(16) < picked, 1.0, -1.0)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        rows = {row.param: row.flops for row in cacompile.explain(Picks(), x).rows}
    assert rows["expert.weight"] == 2 * picked * 32 * 64
    assert rows["out.weight"] == 2 * 16 * 64 * 32


def test_sizes_that_depend_on_data() -> None:
    """Tokens picked by nonzero() count as many as there were."""
    model = Picks()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        run = torch.compile(model, backend="convaware", options=EAGER, fullgraph=True)
        total = 0
        for picked in (3, 11, 16):
            x = torch.randn(16, 32)
            x[:, 0] = torch.where(torch.arange(16) < picked, 1.0, -1.0)
            run(x).sum().backward()
            total += 2 * picked * 32 * 64 + 2 * 16 * 64 * 32
    assert cacompile.session(model).flops[0] == total
    rows = {row.param: row.share for row in cacompile.explain(model).rows}
    assert rows["expert.weight"] == pytest.approx(10 / 26, rel=1e-3)


def trained(start: int, stop: int, saved: Any = None) -> Any:
    """A run over batches of different lengths, from a saved state if there is one; what there is at its end."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Pooled(64)
    options = {"warmup_steps": 2, "monitor_every": 2, "tolerance": 0.5, "block_rows": 16, "inner": "aot_eager"}
    run = torch.compile(model, backend="convaware", options=options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    session = cacompile.session(model)
    if saved is not None:
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        session.load_state_dict(saved[2])
    for i in range(start, stop):
        torch.manual_seed(i)
        x = torch.randn(8, [12, 40, 20, 28, 33, 17][i % 6], 64)
        optimizer.zero_grad()
        F.cross_entropy(run(x), x[:, 0].argmax(-1)).backward()
        optimizer.step()
    return copy.deepcopy((model.state_dict(), optimizer.state_dict(), session.state_dict()))


def test_resuming_goes_on_with_the_same_masks() -> None:
    """What a block costs is the mean of all steps, not of those that a process has happened to compile."""
    whole, resumed = trained(0, 48), trained(21, 48, trained(0, 21))
    assert all(torch.equal(whole[0][name], resumed[0][name]) for name in whole[0])
    assert whole[2]["flops"] == resumed[2]["flops"] and 0 < whole[2]["flops"][1] < whole[2]["flops"][0]
    for name, entry in whole[2]["parameters"].items():
        assert torch.equal(entry["counted"], resumed[2]["parameters"][name]["counted"])


def test_formulas() -> None:
    import sympy

    batch, length = sympy.symbols("s0 s1", positive=True, integer=True)
    each = [Flops(24, 2 * batch * (length + 1)), Flops(8), Flops(6, 3 * sympy.floor(length / 2)), Flops(5, batch / 2)]
    monomials, coefficients = split(each)
    assert [(m.text, m.atoms) for m in monomials] == [
        ("s0*s1", ("s0", "s1")),
        ("s0", ("s0",)),
        ("1", ()),
        ("floor(s1/2)", ("floor(s1/2)",)),
    ]
    assert coefficients == [(2, 2, 0, 0), (0, 0, 8, 0), (0, 0, 0, 3), (0, 0, 5, 0)]
    assert int(sum(each)) == 43 and at_sizes(each[0], dict(zip(monomials, (6, 2, 1, 1)))) == 16
    assert at_sizes(each[0], {Monomial("1", ()): 1}) == 24, "sizes that are not known leave it as it was"
    assert int(each[0] // 2) == 12 and (each[0] // 2 * 3).formula == 3 * batch * (length + 1)


def test_convolutions_and_regions_count_once_in_a_step() -> None:
    """dW of a convolution is an output of the operation that has the formula; a region's body is part of the step."""

    @torch.compiler.nested_compile_region
    def region(layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.first, self.last = nn.Conv1d(16, 32, 3), nn.Linear(10, 10), nn.Linear(10, 10)

        def forward(self, x: Tensor) -> Tensor:
            return region(self.last, region(self.first, self.conv(x)))

    model, x = Model(), torch.randn(4, 16, 12)
    with FlopCounterMode(display=False) as counter:
        model(x).square().mean().backward()
    torch.compile(model, backend="convaware", options=EAGER)(x).square().mean().backward()
    assert cacompile.session(model).step_flops == counter.get_total_flops()


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_whole_step_is_counted_as_torch_counts_it(dynamic: bool) -> None:
    """Forward pass, dX and dW, also where most of it is a frozen base."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Conv1d(32, 32, 3, padding=1).requires_grad_(False)
            self.down, self.up = nn.Linear(32, 16), nn.Linear(16, 32)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.up(self.down(self.base(x.mT).mT))

    model = nn.Sequential(Adapted(), Adapted())
    x = torch.randn(4, 12, 32)
    with FlopCounterMode(display=False) as counter:
        model(x).square().mean().backward()
    run = torch.compile(model, backend="convaware", options=EAGER, dynamic=dynamic)
    for _ in range(3):
        run(x).square().mean().backward()
    session = cacompile.session(model)
    assert session.step_flops == 3 * counter.get_total_flops()
    assert session.flops[0] == 3 * 2 * 4 * 12 * sum(
        p.numel() for p in model.parameters() if p.requires_grad and p.dim() == 2
    )
    state = session.state_dict()
    session.load_state_dict(state)
    assert session.step_flops == state["step_flops"]
