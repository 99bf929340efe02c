"""couple: which dimensions of which parameters are one after operations that move, cut and join entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from coupled import Case, check, couplings, explained, planned
from torch import Tensor

B, T = 2, 5

KEEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "dropout": F.dropout,
    "softmax": lambda x: x.softmax(-1),
    "softmax over time": lambda x: x.softmax(1),
    "cumsum": lambda x: x.cumsum(1),
    "bf16 and back": lambda x: x.bfloat16().float(),
    "where": lambda x: torch.where(x > 0, x, x * 0.1),
    "masked_fill": lambda x: x.masked_fill(x < 0, 0.0),
    "tril": lambda x: x.tril(),
    "clamp": lambda x: x.clamp(-1, 1),
    "a norm without weights": lambda x: F.layer_norm(x, (8,)),
    "divided by its norm": lambda x: x / x.norm(dim=-1, keepdim=True),
    "gated by its mean": lambda x: x * x.mean(1, keepdim=True).sigmoid(),
    "flattened": lambda x: x.reshape(-1, 8),
    "transposed and back": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "padded in time": lambda x: F.pad(x, (0, 0, 1, 0)),
    "shifted in time": lambda x: torch.cat((x[:, :1], x[:, :-1]), 1),
    "rolled in time": lambda x: x.roll(1, 1),
    "flipped in time": lambda x: x.flip(1),
    "steps looked up": lambda x: x[:, torch.arange(2)],
    "steps looked up by a constant": lambda x: x[:, torch.tensor([0, 2])],
    "the best steps": lambda x: x.topk(2, 1).values,
    "sorted in time": lambda x: x.sort(1).values,
    "pooled in time": lambda x: F.max_pool1d(x.transpose(1, 2), 2).transpose(1, 2),
    "mean over time": lambda x: x.mean(1),
    "the last step": lambda x: x[:, -1],
    "repeated in time": lambda x: x.repeat(1, 2, 1),
    "broadcast": lambda x: x[:, None].expand(-1, 3, -1, -1),
    "stacked and summed": lambda x: torch.stack((x, x * 2), 2).sum(2),
    "rows of the batch": lambda x: torch.stack([row.relu() for row in x.unbind(0)]),
    "chunks of the batch": lambda x: torch.cat([part.tanh() for part in x.chunk(2)]),
}


def between(step: Callable[[Tensor], Tensor], expected: str, rows: int = 8) -> Case:
    """Two linear layers with one step between them."""
    return Case(lambda m, x: step(x @ m.a) @ m.b, {"a": (6, 8), "b": (rows, 3)}, expected)


@pytest.mark.parametrize("step", KEEPS.values(), ids=KEEPS.keys())
def test_features_keep_their_meaning(step: Callable[[Tensor], Tensor]) -> None:
    check(between(step, "8: a.1 b.0"), torch.rand(B, T, 6))


def turned_pairs(x: Tensor) -> Tensor:
    pairs = x.unflatten(-1, (4, 2))
    return torch.stack((-pairs[..., 1], pairs[..., 0]), -1).flatten(-2)


HALVES: dict[str, Callable[[Tensor], Tensor]] = {
    "one half": lambda x: x[..., 4:],
    "one of each pair": lambda x: x.unflatten(-1, (4, 2))[..., 1],
    "sums of pairs": lambda x: x.unflatten(-1, (4, 2)).sum(-1),
    "halves": lambda x: x[..., :4] * x[..., 4:],
    "chunks": lambda x: torch.mul(*x.chunk(2, -1)),
    "split": lambda x: torch.mul(*x.split(4, -1)),
    "glu": F.glu,
    "two rows": lambda x: x.unflatten(-1, (2, 4)).prod(-2),
    "unbound rows": lambda x: torch.mul(*x.unflatten(-1, (2, 4)).unbind(-2)),
    "interleaved": lambda x: x[..., ::2] * x[..., 1::2],
    "interleaved, unbound": lambda x: torch.mul(*x.unflatten(-1, (4, 2)).unbind(-1)),
    "interleaved, joined anew": lambda x: turned_pairs(x)[..., ::2],
}


@pytest.mark.parametrize("step", HALVES.values(), ids=HALVES.keys())
def test_half_of_the_features(step: Callable[[Tensor], Tensor]) -> None:
    check(between(step, "4: a.1 b.0", 4), torch.rand(B, T, 6))


JOINED: dict[str, Case] = {
    "halves swapped": between(lambda x: torch.cat((-x[..., 4:], x[..., :4]), -1), "4: a.1 b.0 | 4: a.1 b.0"),
    "halves turned": between(lambda x: x + torch.cat((-x[..., 4:], x[..., :4]), -1), "4: a.1 b.0"),
    "pairs turned": between(turned_pairs, "4: a.1 b.0"),
    "unequal parts": between(lambda x: torch.cat([p * 2 for p in x.split((6, 2), -1)], -1), "2: a.1 b.0 | 6: a.1 b.0"),
    "after themselves": between(lambda x: torch.cat((x, x), -1), "8: a.1 b.0", 16),
    "repeated": between(lambda x: x.repeat(1, 1, 2), "8: a.1 b.0", 16),
    "each twice": between(lambda x: x[..., None].expand(-1, -1, -1, 2).flatten(-2), "8: a.1 b.0", 16),
    "repeat_interleave": between(lambda x: x.repeat_interleave(2, -1), "8: a.1 b.0", 16),
    "with the time": between(lambda x: x.flatten(1), "8: a.1 b.0", 8 * T),
}  # fmt: skip


@pytest.mark.parametrize("case", JOINED.values(), ids=JOINED.keys())
def test_features_cut_and_joined(case: Case) -> None:
    check(case, torch.rand(B, T, 6))


LOST: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "rolled": (lambda x: x.roll(1, -1), 8),
    "flipped": (lambda x: x.flip(-1), 8),
    "looked up": (lambda x: x[..., torch.arange(2)], 2),
    "sorted": (lambda x: x.sort(-1).values, 8),
    "padded": (lambda x: F.pad(x, (0, 1)), 9),
    "mixed": (lambda x: x @ torch.ones(8, 8), 8),
    "mixed over time": (lambda x: x.transpose(1, 2) @ torch.ones(T, 4), 4),
}


@pytest.mark.parametrize(("step", "rows"), LOST.values(), ids=LOST.keys())
def test_features_that_are_others_afterwards(step: Callable[[Tensor], Tensor], rows: int) -> None:
    assert couplings(planned(between(step, "", rows), torch.rand(B, T, 6))) == []


def gated(m: Any, x: Tensor) -> Tensor:
    return (F.silu(x @ m.gate) * (x @ m.up)) @ m.down


def residual(m: Any, x: Tensor) -> Tensor:
    x = x @ m.stem
    x = x + F.layer_norm(x, (4,), m.norm).matmul(m.up).relu() @ m.down
    return x @ m.head


def experts(m: Any, x: Tensor) -> Tensor:
    hidden = torch.einsum("btd,edf->ebtf", x, m.up).relu()
    return torch.einsum("ebtf,efd,bte->btd", hidden, m.down, (x @ m.router).softmax(-1))


def tied_head(m: Any, x: Tensor) -> Tensor:
    return (F.embedding(x.argmax(-1), m.table) @ m.a).relu() @ m.b @ m.table.t()


LAYERS: dict[str, Case] = {
    "bias": Case(lambda m, x: F.linear(x, m.a, m.bias) @ m.b, {"a": (8, 6), "bias": (8,), "b": (8, 3)},
                 "8: a.0 bias.0 b.0"),
    "scale": Case(lambda m, x: (x @ m.a * m.s) @ m.b, {"a": (6, 8), "s": (8,), "b": (8, 3)}, "8: a.1 s.0 b.0"),
    "a vector for weight": Case(lambda m, x: (x @ m.a) @ m.v, {"a": (6, 8), "v": (8,)}, "8: a.1 v.0"),
    "branches joined": Case(lambda m, x: torch.cat((x @ m.a, x @ m.b), -1) @ m.c,
                            {"a": (6, 4), "b": (6, 8), "c": (12, 3)}, "6: a.0 b.0 | 4: a.1 c.0 | 8: b.1 c.0"),
    "branches stacked": Case(lambda m, x: torch.stack((x @ m.a, x @ m.b), -1).sum(-1) @ m.c,
                             {"a": (6, 8), "b": (6, 8), "c": (8, 3)}, "6: a.0 b.0 | 8: a.1 b.1 c.0"),
    "gated": Case(gated, {"gate": (6, 8), "up": (6, 8), "down": (8, 3)}, "6: gate.0 up.0 | 8: gate.1 up.1 down.0"),
    "residual": Case(residual, {"stem": (6, 4), "norm": (4,), "up": (4, 8), "down": (8, 4), "head": (4, 3)},
                     "4: stem.1 norm.0 up.0 down.1 head.0 | 8: up.1 down.0"),
    "low rank": Case(lambda m, x: F.linear(x, m.w) + (x @ m.a) @ m.b, {"w": (8, 6), "a": (6, 2), "b": (2, 8)},
                     "8: w.0 b.1 | 6: w.1 a.0 | 2: a.1 b.0"),
    "weight norm": Case(lambda m, x: F.linear(x, m.gain * m.v / m.v.norm(dim=1, keepdim=True)) @ m.out,
                        {"gain": (8, 1), "v": (8, 6), "out": (8, 3)}, "8: gain.0 v.0 out.0"),
    "weights joined": Case(lambda m, x: F.linear(x, torch.cat((m.a, m.b))) @ m.c,
                           {"a": (4, 6), "b": (8, 6), "c": (12, 3)}, "6: a.1 b.1 | 4: a.0 c.0 | 8: b.0 c.0"),
    "mixed over time": Case(lambda m, x: (x.transpose(1, 2) @ m.a).relu() @ m.b, {"a": (5, 8), "b": (8, 5)},
                            "8: a.1 b.0"),
    "experts": Case(experts, {"router": (6, 4), "up": (4, 6, 8), "down": (4, 8, 6)},
                    "4: router.1 up.0 down.0 | 6: router.0 up.1 | 8: up.2 down.1"),
    "tied head": Case(tied_head, {"table": (10, 6), "a": (6, 8), "b": (8, 6)},
                      "6: table.1 a.0 b.1 | 8: a.1 b.0"),
    "positions": Case(lambda m, x: (x + m.place[:T]) @ m.a, {"place": (7, 6), "a": (6, 8)}, "6: place.1 a.0"),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS.keys())
def test_layers(case: Case) -> None:
    check(case, torch.rand(B, T, 6))


def test_a_cut_in_time_leaves_features_and_is_named() -> None:
    check(between(lambda x: x[:, :4:2], "8: a.1 b.0"), torch.rand(B, T, 6), untraced="a slice with step 2")


def test_differences_of_many_neighbours() -> None:
    """Each feature tied to the next: followed no further than is quick, and what is computed from them is masked."""
    case = Case(lambda m, x: (x @ m.a).diff() @ m.b, {"a": (6, 2_000), "b": (1_999, 3)}, "")
    found = explained(case, torch.rand(B, T, 6))
    assert found.coverage == pytest.approx(1.0)
    assert found.analysis_s < 5.0
