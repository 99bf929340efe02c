"""Backwards that end where all below is frozen: against eager, where the same parameters have requires_grad=False."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import Block, Step, assert_bits, compile_all, square_mean, train_step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import cacompile
from cacompile.graph import truncated

EAGER = {"options": {"inner": "aot_eager"}}


class Stack(nn.Module):
    """Residual blocks, one after another; what the parameters of this class say is between or around them."""

    def __init__(self, count: int = 3, between: nn.Module | None = None, breaks: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(count))
        self.between = between or nn.Identity()
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.between(block(x))
            if self.breaks:
                torch._dynamo.graph_break()
        return x


class Checkpointed(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


class Lora(nn.Module):
    """Linear layers that are frozen for good, each with an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.ModuleList(nn.Linear(32, 32) for _ in range(3)).requires_grad_(False)
        self.down = nn.ModuleList(nn.Linear(32, 4, bias=False) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(4, 32, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for base, down, up in zip(self.base, self.down, self.up):
            x = torch.relu(base(x) + up(down(x)))
        return x


class Tied(nn.Module):
    """The embedding is the head too: what is frozen between them stands in its way down."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(48, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return x @ self.embed.weight.T


class Shared(nn.Module):
    """One block three times, among others."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.shared, self.above = Block(), Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(self.above(self.shared(self.shared(self.below(x)))))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 8),
    )  # fmt: skip


def rows() -> list[Tensor]:
    return [torch.randn(16, 32)]


@dataclass(frozen=True)
class Case:
    """A model, its batch, what is frozen of it, and whether that ends its backward early."""

    model: Callable[[], nn.Module]
    frozen: Sequence[str]
    batch: Callable[[], list[Tensor]] = rows
    ends: bool = True


CASES = {
    "blocks": Case(Stack, ["blocks.[01]"]),
    "weights alone": Case(Stack, ["blocks.[01].*.weight"]),
    "in the middle": Case(Stack, ["blocks.1"]),
    "breaks": Case(lambda: Stack(breaks=True), ["blocks.[01]"]),
    "breaks above": Case(lambda: Stack(breaks=True), ["blocks.[12]"]),
    "dropout": Case(lambda: Stack(between=nn.Dropout(0.5)), ["blocks.[01]"]),
    "checkpointed": Case(Checkpointed, ["blocks.[01]"]),
    "lora": Case(Lora, ["*.0.weight", "*.1.weight"]),
    "tied": Case(Tied, ["blocks"], lambda: [torch.randint(48, (4, 8))], ends=False),
    "tied and frozen": Case(Tied, ["embed", "blocks.0"], lambda: [torch.randint(48, (4, 8))]),
    "shared": Case(Shared, ["below", "shared"]),
    "shared alone": Case(Shared, ["shared"], ends=False),
    "batch norm": Case(conv, ["[0-4]"], lambda: [torch.randn(4, 3, 8, 8)]),
    "everything": Case(Stack, ["*"]),
}


def oracle(model: nn.Module, frozen: Sequence[str]) -> nn.Module:
    """A copy in which the same parameters want no gradient."""
    copied = copy.deepcopy(model)
    names = [name for each in frozen for name in cacompile.session(copied).freeze(each)]
    cacompile.session(copied).thaw()
    for name in names:
        copied.get_parameter(name).requires_grad_(False)
    return copied


def step_of(compiled: tuple[nn.Module, Callable[..., Any]], batch: Sequence[Any]) -> Step:
    torch.manual_seed(3)
    return train_step(compiled, batch)


def assert_near(ours: Step, theirs: Step, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=rtol, atol=0)
    for name, expected in theirs.grads.items():
        actual = ours.grads[name]
        assert (actual is None) == (expected is None), f"{name}: one has no gradient"
        if actual is not None and expected is not None:
            atol = rtol * float(expected.abs().max()) + 1e-7  # what BatchNorm takes away again is rounding alone
            torch.testing.assert_close(actual, expected, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def backward_flops(model: nn.Module, call: Callable[..., Any], batch: Sequence[Any]) -> int:
    torch.manual_seed(3)
    model.zero_grad(set_to_none=True)
    loss = square_mean(call(*batch))
    if loss.requires_grad:
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        return counter.get_total_flops()
    return 0


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_as_without_requires_grad(case: Case, inner: str) -> None:
    model, batch = case.model(), case.batch()
    theirs, dense = oracle(model, case.frozen), copy.deepcopy(model)
    run, session = compile_all(model, "convaware", options={"inner": inner}), cacompile.session(model)

    def plain(other: nn.Module) -> tuple[nn.Module, Callable[..., Any]]:
        return other, other if inner == "aot_eager" else compile_all(other, "inductor")

    before = step_of((model, run), batch)
    assert_near(before, step_of(plain(dense), batch))
    frozen = {name for each in case.frozen for name in session.freeze(each)}
    expected = step_of(plain(theirs), batch)
    step_of((model, run), batch)  # the versions are compiled
    buffers = dict(theirs.named_buffers())
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = step_of((model, run), batch)
        again = step_of((model, run), batch)
        assert_near(found, expected)
        if inner == "inductor":
            for name, theirs_of in expected.grads.items():
                assert_bits(found.grads[name], theirs_of, name)
        for name, grad in before.grads.items():
            assert (found.grads[name] is None) == (name in frozen or grad is None), name
            assert grad is None or found.grads[name] is None or torch.equal(found.grads[name], again.grads[name]), name
        session.thaw()
        for name, grad in step_of((model, run), batch).grads.items():
            assert grad is None or torch.equal(grad, before.grads[name]), name
    if not isinstance(model, nn.Sequential):
        return
    for name, buffer in model.named_buffers():  # running statistics go on, whatever is frozen
        if name.endswith("num_batches_tracked"):
            assert buffer == 5 and buffers[name] == 1


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("checkpointed", "everything")])
def test_a_step_is_counted_as_far_down_as_it_goes(name: str) -> None:
    """Forward pass, dX and dW, as torch counts them where the same parameters have requires_grad=False."""
    case = CASES[name]
    model, batch = case.model(), case.batch()
    theirs = oracle(model, case.frozen)
    run, session = compile_all(model, "convaware", **EAGER), cacompile.session(model)
    step_of((model, run), batch)
    for each in case.frozen:
        session.freeze(each)
    step_of((model, run), batch)
    step, dw, forward = session.step_flops, session.flops[0], session.forward_flops
    step_of((model, run), batch)
    with FlopCounterMode(display=False) as counter:
        theirs(*batch)
    assert session.forward_flops - forward == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        square_mean(theirs(*batch)).backward()
    assert session.step_flops - step == counter.get_total_flops()
    trained = sum(session.params[n].flops.sum() for n, p in theirs.named_parameters() if p.requires_grad)
    assert session.flops[0] - dw == pytest.approx(trained)
    found = cacompile.explain(model).step
    assert (found.forward, found.dw) == (session.forward_flops - forward, session.flops[0] - dw)
    if "breaks" not in name:  # a graph by itself does not know that nothing is trained below it
        assert found.total == counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "blocks",
            "8 of 12 parameters frozen: the backward computes .* down to the gradient of blocks.2.up.(weight|bias)$",
        ),
        ("tied", "down to the gradient of embed.weight; blocks.* and 7 more lie above it .* stays open$"),
    ],
)
def test_explain_says_where_the_backward_ends(name: str, words: str) -> None:
    case = CASES[name]
    model = case.model()
    run, session = compile_all(model, "convaware", **EAGER), cacompile.session(model)
    step_of((model, run), case.batch())
    assert cacompile.explain(model).ways_down == ()
    session.freeze(*case.frozen)
    (text,) = cacompile.explain(model).ways_down
    assert re.search(words, text) and text in str(cacompile.explain(model))


@pytest.mark.parametrize("name", [name for name in CASES if name != "checkpointed"])
def test_it_costs_what_it_costs_without_requires_grad(name: str) -> None:
    case = CASES[name]
    model, batch = case.model(), case.batch()
    theirs = oracle(model, case.frozen)
    run, session = compile_all(model, "convaware", **EAGER), cacompile.session(model)
    dense = backward_flops(model, run, batch)
    for each in case.frozen:
        session.freeze(each)
    backward_flops(model, run, batch)
    assert backward_flops(model, run, batch) == backward_flops(theirs, theirs, batch) < dense


def test_blocks_compiled_one_by_one_cost_their_forward_alone() -> None:
    model = Stack()
    theirs = oracle(model, ["blocks.[01]"])
    for block in model.blocks:
        block.compile(backend="convaware", **EAGER)
    session = cacompile.session(model)
    backward_flops(model, model, rows())
    session.freeze("blocks.[01]")
    for _ in range(2):
        backward_flops(model, model, rows())
    with torch._dynamo.config.patch(error_on_recompile=True):
        batch = rows()
        assert_near(step_of((model, model), batch), step_of((theirs, theirs), batch))
        assert backward_flops(model, model, batch) == backward_flops(theirs, theirs, batch)
        saved: list[Any] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            model.blocks[1](model.blocks[0](*batch))
        assert not saved, "a block that is off, with nothing live below, saves nothing"
        session.thaw("blocks.0")
        theirs = oracle(model, ["blocks.1"])
        batch[0].add_(1.0)
        step_of((model, model), batch)
        assert_near(step_of((model, model), batch), step_of((theirs, theirs), batch))


@pytest.mark.parametrize("wants", ["input", "module", "retained", "python"])
def test_what_wants_a_gradient_below_gets_it(wants: str) -> None:
    """Of all that lies below a frozen block."""

    class Own(torch.autograd.Function):
        """Hides its weight, as reentrant checkpointing does."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2.0

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 2.0

    block, below = Block(), nn.Linear(32, 32)
    run = compile_all(block, "convaware", **EAGER)
    cacompile.session(block).freeze("*")
    for _ in range(3):
        x = torch.randn(16, 32, requires_grad=wants != "module")
        h = x if wants == "input" else below(x) if wants == "module" else Own.apply(x) if wants == "python" else x * 2.0
        if wants == "retained":
            h.retain_grad()
        run(h).sum().backward()
        leaf = {"module": below.weight, "retained": h}.get(wants, x)
        assert leaf.grad is not None and leaf.grad.any()


def test_eager_layers_between_frozen_blocks_let_nothing_through() -> None:
    model = Stack(between=nn.Tanh())
    for block in model.blocks:
        block.compile(backend="convaware", **EAGER)
    session = cacompile.session(model)
    session.freeze("blocks.[01]")
    theirs = oracle(model, ["blocks.[01]"])
    for _ in range(3):
        batch = rows()
        assert_near(step_of((model, model), batch), step_of((theirs, theirs), batch))
    assert backward_flops(model, model, batch) == backward_flops(theirs, theirs, batch)


def test_outputs_can_be_written_to() -> None:
    block = Block()
    run = compile_all(block, "convaware", **EAGER)
    cacompile.session(block).freeze("*")
    for _ in range(3):
        out = run(torch.randn(4, 32))
        out += 1.0
        assert out.requires_grad
        (out * torch.ones(32, requires_grad=True)).sum().backward()
    assert all(param.grad is None for param in block.parameters())


def test_masked_and_truncated() -> None:
    model = Stack()
    run, session = compile_all(model, "convaware", **EAGER), cacompile.session(model)
    batch = rows()
    dense = step_of((model, run), batch)
    session.pin({"blocks.2.neurons[0:16]": False})
    session.freeze("blocks.[01]")
    for _ in range(2):
        found = step_of((model, run), batch)
    assert session.bindings[0].ran == "truncated and masked"
    assert not found.grads["blocks.2.up.weight"][:16].any()
    torch.testing.assert_close(found.grads["blocks.2.up.weight"][16:], dense.grads["blocks.2.up.weight"][16:])
    assert all((grad is None) == (not name.startswith("blocks.2")) for name, grad in found.grads.items())


def test_where_all_below_is_skipped_the_backward_ends_too() -> None:
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(4)))
    run, session = compile_all(model, "convaware", **EAGER), cacompile.session(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    batch = rows()
    dense = backward_flops(model, run, batch)
    optimizer.step()
    session.pin({"0.weight": False, "1.weight": False})
    backward_flops(model, run, batch)
    assert backward_flops(model, run, batch) == dense // 7, "one of three dX; masked dW are not counted"
    assert not model[0].weight.grad.any() and model[2].weight.grad.any()
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model[0].weight, before), "what is skipped gets its estimate"


def test_the_cache_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Stack(4)
    run = compile_all(model, "convaware", options={"inner": "aot_eager", "max_truncated": 2})
    session, batch = cacompile.session(model), rows()
    monkeypatch.setattr(truncated, "STALE", 6)

    def made() -> int:
        return torch._dynamo.utils.counters["cacompile"]["versions compiled: truncated"]

    first = made()
    for pattern in ("blocks.0", "blocks.[01]", "blocks.[012]"):
        session.freeze(pattern)
        grads = step_of((model, run), batch).grads
        assert all((grad is None) == (name in session.frozen_since) for name, grad in grads.items())
    assert made() == first + 2, "the third is served by the second"
    for _ in range(8):
        step_of((model, run), batch)
    assert made() == first + 3, "one that nobody has used for long has made room"


def test_no_version_is_cut_where_none_is_wanted() -> None:
    model, batch = Stack(), rows()
    run = compile_all(model, "convaware", options={"inner": "aot_eager", "max_truncated": 0})
    cacompile.session(model).freeze("blocks.0")
    grads = step_of((model, run), batch).grads
    assert [name for name, grad in grads.items() if grad is None] == [n for n in grads if n.startswith("blocks.0")]


def test_a_truncated_version_that_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no")

    model, batch = Stack(), rows()
    run, session = compile_all(model, "convaware", **EAGER), cacompile.session(model)
    dense = step_of((model, run), batch)
    monkeypatch.setattr(truncated, "truncate", fail)
    session.freeze("blocks.0")
    for _ in range(2):
        for name, grad in step_of((model, run), batch).grads.items():
            assert (grad is None) if name.startswith("blocks.0") else torch.equal(grad, dense.grads[name])


def test_each_version_is_a_recording_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA graphs Inductor's last step records what it is given: every version must go through it by itself."""
    seen: list[tuple[bool, bool, int]] = []

    def last_step(gm: Any, inputs: Any, **settings: Any) -> Any:
        seen.append((settings.get("is_backward", False), bool(settings["cudagraphs"]), id(gm)))

        def run(args: list[Any]) -> Any:
            return gm(*args)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    monkeypatch.setattr("cacompile.graph.inner.compile_fx_inner", last_step)
    model, batch = Stack(), rows()
    run = compile_all(model, "convaware", options={"triton.cudagraphs": True})
    session = cacompile.session(model)
    step_of((model, run), batch)
    for pattern in ("blocks.0", "blocks.[01]"):
        session.freeze(pattern)
        for _ in range(2):
            step_of((model, run), batch)
    session.thaw()
    step_of((model, run), batch)
    assert [backward for backward, _, _ in seen] == [False, True, *2 * [True, False]]
    assert all(recorded for _, recorded, _ in seen) and len({number for _, _, number in seen}) == len(seen)


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, 0.01, 0.9, weight_decay=0.1),
    "adamw": lambda params: torch.optim.AdamW(params, 0.01),
}


@pytest.mark.thin(2)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("name", [name for name in CASES if name != "everything"])
def test_freezing_at_random(name: str, make: Callable[..., torch.optim.Optimizer], changes: int = 10) -> None:
    """Another set is frozen in each step: gradients and weights as in eager, bit for bit, and nothing is recompiled."""
    case, rng = CASES[name], random.Random(name)
    model = case.model()
    theirs = copy.deepcopy(model)
    run, session = compile_all(model, "convaware", **EAGER), cacompile.session(model)
    optimizers = [make([p for p in each.parameters() if p.requires_grad]) for each in (model, theirs)]
    trained = [n for n, param in model.named_parameters() if param.requires_grad]
    step_of((model, run), case.batch())
    with torch._dynamo.config.patch(error_on_recompile=True):
        for change in range(changes):
            frozen = {n for n in trained if rng.random() < rng.choice([0.2, 0.5, 0.9])}
            session.thaw()
            if frozen:
                session.freeze(*frozen)
            for n in trained:
                theirs.get_parameter(n).requires_grad_(n not in frozen)
            batch = case.batch()
            found, expected = step_of((model, run), batch), step_of((theirs, theirs), batch)
            for n, grad in expected.grads.items():
                assert_bits(found.grads[n], grad, f"change {change}: {n}")
            for optimizer in optimizers:
                optimizer.step()
            for (n, ours), other in zip(model.named_parameters(), theirs.parameters()):
                assert torch.equal(ours, other), f"change {change}: {n}"


@pytest.mark.slow
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("name", [name for name in CASES if name != "everything"])
def test_freezing_200_times_at_random(name: str, make: Callable[..., torch.optim.Optimizer]) -> None:
    test_freezing_at_random(name, make, 200)
