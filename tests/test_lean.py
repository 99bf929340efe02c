"""Forwards that save no more than a truncated backward reads, and backwards that know which forward they follow."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from helpers import Block, assert_bits, square_mean
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cacompile
from cacompile import torch_internals
from cacompile.graph import lean, truncated

OPTIONS = {"inner": "aot_eager", "block_rows": 16, "warmup_steps": 10**6}
Grads = dict[str, Tensor | None]


class Blocks(nn.Module):
    """Residual blocks with dropout between them."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = nn.functional.dropout(torch.tanh(block(x)), 0.2, self.training)
        return x


def rows(count: int = 16) -> Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(count))


def forward(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    torch.manual_seed(3)
    return square_mean(run(x))


def grads(model: nn.Module) -> Grads:
    found = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def trained(inner: str = "aot_eager", **settings: Any) -> tuple[nn.Module, Any, Any]:
    """A model, what runs it, and its session, after one dense step: before that nothing is known of its backward."""
    model = Blocks()
    run = torch.compile(model, backend="convaware", options={**OPTIONS, "inner": inner}, **settings)
    forward(run, rows()).backward()
    model.zero_grad(set_to_none=True)
    return model, run, cacompile.session(model)


def expected(model: nn.Module, frozen: Sequence[str], x: Tensor) -> Grads:
    """In eager, with requires_grad=False."""
    theirs = copy.deepcopy(model)
    for name, param in theirs.named_parameters():
        param.requires_grad_(name not in frozen)
    forward(theirs, x).backward()
    return grads(theirs)


def assert_grads(found: Grads, wanted: Grads) -> None:
    for name, grad in wanted.items():
        assert_bits(found[name], grad, name)


def saved_bytes(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Of activations: what autograd saves, but for parameters and inputs."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), x)}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward(run, x)
    del loss
    return sum(storages.values())


@pytest.fixture
def retained() -> Iterator[None]:
    """torch compiles backwards that may overwrite what was saved, and refuses `retain_graph` then."""
    with torch._functorch.config.patch(donated_buffer=False):
        yield


@pytest.mark.parametrize(
    ("cut", "inner"),
    [(1, "aot_eager"), (2, "aot_eager"), pytest.param(1, "inductor", marks=pytest.mark.slow), (2, "inductor")],
)
def test_it_saves_what_is_saved_without_requires_grad(cut: int, inner: str) -> None:
    model, run, session = trained(inner)
    theirs = copy.deepcopy(model)
    theirs.blocks[:cut].requires_grad_(False)
    plain = torch.compile(theirs, backend=inner)
    dense = saved_bytes(model, run, rows())
    session.freeze(*(f"blocks.{i}" for i in range(cut)))
    forward(run, rows()).backward()
    wanted = saved_bytes(theirs, plain, rows())
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert saved_bytes(model, run, rows()) == wanted < dense
        forward(run, rows()).backward()
        session.thaw()
        assert saved_bytes(model, run, rows()) == dense
    forward(plain, rows()).backward()
    model.zero_grad(set_to_none=True)
    session.freeze(*(f"blocks.{i}" for i in range(cut)))
    forward(run, rows()).backward()
    assert_grads(grads(model), grads(theirs))


def test_what_is_frozen_in_the_forward_decides() -> None:
    """Thawed, or frozen otherwise, between a forward and its backward."""
    model, run, session = trained()
    dense = expected(model, [], rows())
    names = session.freeze("blocks.[01]")
    wanted = expected(model, names, rows())
    loss = forward(run, rows())
    session.thaw("blocks.1")
    loss.backward()
    assert_grads(grads(model), wanted)
    session.freeze("blocks.1")
    loss = forward(run, rows())
    session.thaw()
    session.freeze("blocks.2.up")
    loss.backward()
    later = {name: None if name.startswith("blocks.2.up") else grad for name, grad in wanted.items()}
    assert_grads(grads(model), later)
    session.thaw()
    loss = forward(run, rows())
    session.freeze("blocks.0")
    loss.backward()
    assert_grads(grads(model), {n: None if n.startswith("blocks.0") else grad for n, grad in dense.items()})
    session.thaw()
    forward(run, rows()).backward()
    assert_grads(grads(model), dense)


def test_forwards_may_be_open_at_the_same_time(retained: None) -> None:
    model, run, session = trained()
    losses: list[tuple[Tensor, Grads]] = []
    for pattern in ("blocks.0", "blocks.[01]", "nothing", "blocks.0"):
        names = [] if pattern == "nothing" else session.freeze(pattern)
        losses.append((forward(run, rows()), expected(model, names, rows())))
        session.thaw()
    for loss, wanted in reversed(losses):
        loss.backward(retain_graph=True)
        assert_grads(grads(model), wanted)
    for loss, wanted in losses:
        loss.backward()
        assert_grads(grads(model), wanted)


def test_a_backward_that_has_made_room_is_made_again_for_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truncated, "STALE", 0)
    model = Blocks()
    run = torch.compile(model, backend="convaware", options={**OPTIONS, "max_truncated": 1})
    forward(run, rows()).backward()
    model.zero_grad(set_to_none=True)
    session = cacompile.session(model)
    names = session.freeze("blocks.0")
    wanted = expected(model, names, rows())
    forward(run, rows()).backward()
    assert_grads(grads(model), wanted)
    loss = forward(run, rows())
    also = session.freeze("blocks.1")
    forward(run, rows()).backward()
    assert_grads(grads(model), expected(model, [*names, *also], rows()))
    session.thaw("blocks.1")
    before = torch._dynamo.utils.counters["cacompile"]["versions compiled: truncated"]
    loss.backward()
    assert_grads(grads(model), wanted)
    assert torch._dynamo.utils.counters["cacompile"]["versions compiled: truncated"] == before + 1
    loss = forward(run, rows())
    session.freeze("blocks.1")
    forward(run, rows()).backward()
    monkeypatch.setattr(truncated, "truncate", None)
    with pytest.raises(RuntimeError, match="cannot be compiled again"):
        loss.backward()


def test_gradients_in_hand(retained: None) -> None:
    model, run, session = trained()
    session.pin({"blocks.2.neurons[0:16]": False})
    names = session.freeze("blocks.[01]")
    wanted = expected(model, names, rows())
    for _ in range(2):
        loss = forward(run, rows())
        (found,) = torch.autograd.grad(loss, [model.blocks[2].up.weight], retain_graph=True)
        assert torch.equal(found, wanted["blocks.2.up.weight"]), "whoever asks for a gradient gets all of it"
        with pytest.raises(RuntimeError, match="not have been used in the graph"):
            torch.autograd.grad(loss, [model.blocks[0].up.weight])


def test_a_mask_above_the_cut() -> None:
    model, run, session = trained()
    names = session.freeze("blocks.[01]")
    wanted = expected(model, names, rows())
    session.pin({"blocks.2.neurons[0:16]": False})
    for _ in range(3):
        forward(run, rows()).backward()
        found = grads(model)
        assert not found["blocks.2.up.weight"][:16].any()
        assert torch.equal(found["blocks.2.up.weight"][16:], wanted["blocks.2.up.weight"][16:])
    assert session.bindings[0].ran == "truncated and masked"


@pytest.mark.parametrize("how", ["raises", "other strides"])
def test_where_none_can_be_made_all_is_saved(how: str, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no")

    model, run, session = trained()
    dense = saved_bytes(model, run, rows())
    if how == "raises":
        monkeypatch.setattr(lean, "truncate", fail)
    else:
        monkeypatch.setattr(lean, "_agree", lambda whole, strides: False)
    names = session.freeze("blocks.[01]")
    with caplog.at_level(logging.INFO, logger="cacompile"):
        for _ in range(2):
            forward(run, rows()).backward()
            assert_grads(grads(model), expected(model, names, rows()))
    assert saved_bytes(model, run, rows()) == dense
    words = "could not be made, so all is saved" if how == "raises" else "would lay out in another way"
    assert len([record for record in caplog.records if words in record.getMessage()]) == 1


def test_strides_are_compared() -> None:
    assert lean._agree([(4, 1), None, (1,)], [(4, 1), None, None]) and lean._agree([], [])
    assert not lean._agree([(4, 1)], [(1, 4)]) and not lean._agree([(4, 1)], []) and not lean._agree([None], [(1,)])


def test_sizes_that_change() -> None:
    model, run, session = trained(dynamic=True)
    names = session.freeze("blocks.[01]")
    for count in (16, 8, 24):
        with torch._dynamo.config.patch(error_on_recompile=count != 16):
            loss = forward(run, rows(count))
            loss.backward()
        assert_grads(grads(model), expected(model, names, rows(count)))


@pytest.mark.parametrize("thawed", [False, True])
@pytest.mark.parametrize("view", [False, True])
def test_compiled_autograd_around_one_backward(thawed: bool, view: bool) -> None:
    """It traces a backward of its own, whose forward has not saved all: that ends where the forward's cut is."""
    model, run, session = trained()
    call = (lambda x: run(x).view(2, -1)) if view else run
    names = session.freeze("blocks.[01]")
    wanted = expected(model, names, rows())
    for _ in range(2):
        forward(call, rows()).backward()
        assert_grads(grads(model), wanted)
    loss = forward(call, rows())
    if thawed:
        session.thaw()
    traced: list[torch.fx.GraphModule] = []
    with torch._dynamo.compiled_autograd._enable(lambda gm: traced.append(gm) or gm):
        loss.backward()
    assert traced
    assert_grads(grads(model), wanted)
    whole = expected(model, session.frozen_since, rows())
    with torch._dynamo.compiled_autograd._enable(lambda gm: gm):
        forward(call, rows()).backward()
    assert_grads(grads(model), whole)


def test_a_forward_saves_all_where_compiled_autograd_could_not_be_told() -> None:
    model, run, session = trained()
    dense = saved_bytes(model, run, rows())
    names = session.freeze("blocks.[01]")
    with torch_internals.taken_away("CachedBackward"):
        forward(run, rows()).backward()
        assert_grads(grads(model), expected(model, names, rows()))
        assert saved_bytes(model, run, rows()) == dense
    forward(run, rows()).backward()
    assert saved_bytes(model, run, rows()) < dense


def test_hooks_for_what_is_saved_and_checkpoints_around_it() -> None:
    model, run, session = trained()
    names = session.freeze("blocks.[01]")
    wanted = expected(model, names, rows())
    for _ in range(2):
        with torch.autograd.graph.save_on_cpu():
            loss = forward(run, rows())
        loss.backward()
        assert_grads(grads(model), wanted)
        forward(lambda x: checkpoint(run, x, use_reentrant=False), rows()).backward()
        assert_grads(grads(model), wanted)
