"""couple: which dimensions are one after entries were looked up, put elsewhere or summed; and that none fall silent."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from coupled import Case, couplings, explained
from coupled import check as check_as_looked_at
from torch import Tensor

# with Dynamo, which makes inputs of tensors that are global
check = functools.partial(check_as_looked_at, look=explained)

EDGES, NODES = 12, 4
TO = torch.arange(EDGES) % NODES


def nodes(x: Tensor) -> Tensor:
    return x.new_zeros(NODES, x.shape[-1])


def across(x: Tensor, index: Tensor = TO) -> Tensor:
    return index[:, None].expand(-1, x.shape[-1])


SUMMED: dict[str, Callable[[Tensor], Tensor]] = {
    "index_add": lambda x: nodes(x).index_add(0, TO, x),
    "index_add_": lambda x: nodes(x).index_add_(0, TO, x),
    "index_add, of halves": lambda x: nodes(x).index_add(0, TO, x, alpha=0.5),
    "index_copy": lambda x: nodes(x).index_copy(0, TO[:NODES], x[:NODES]),
    "index_reduce": lambda x: nodes(x).index_reduce(0, TO, x, "mean"),
    "scatter": lambda x: nodes(x).scatter(0, across(x), x),
    "scatter_add": lambda x: nodes(x).scatter_add(0, across(x), x),
    "scatter_add_": lambda x: nodes(x).scatter_add_(0, across(x), x),
    "sum": lambda x: nodes(x).scatter_reduce(0, across(x), x, "sum"),
    "mean": lambda x: nodes(x).scatter_reduce(0, across(x), x, "mean", include_self=False),
    "max": lambda x: nodes(x).scatter_reduce(0, across(x), x, "amax"),
    "index_put": lambda x: nodes(x).index_put((TO,), x, accumulate=True),
    "index_put_": lambda x: nodes(x).index_put_((TO,), x, accumulate=True),
    "index_put, at two": lambda x: x.new_zeros(2, NODES, 8).index_put((TO % 2, TO), x, accumulate=True),
    "index_put, behind another": lambda x: x.new_zeros(2, NODES, 8).index_put((torch.tensor([1]), TO), x),
    "segments": lambda x: torch.segment_reduce(x, "sum", lengths=torch.full((NODES,), 3), unsafe=True),
    "bags": lambda x: F.embedding_bag(torch.arange(EDGES), x, torch.arange(NODES) * 3, mode="sum"),
    "slice_scatter": lambda x: nodes(x).slice_scatter(x[:2], 0, 1, 3),
    "select_scatter": lambda x: nodes(x).select_scatter(x[0], 0, 1),
    "masked_scatter, whole rows": lambda x: torch.zeros(EDGES, 8).masked_scatter((TO > 0)[:, None], x),
    "set by a mask": lambda x: x.index_put((TO > 0,), x.new_zeros(())),
    "index_select": lambda x: x.index_select(0, TO),
    "index": lambda x: x[TO],
    "gather": lambda x: x.gather(0, across(x)),
    "take_along_dim": lambda x: x.take_along_dim(TO[:, None], 0),
}  # fmt: skip


@pytest.mark.parametrize("step", SUMMED.values(), ids=SUMMED.keys())
def test_features_of_messages_keep_their_meaning(step: Callable[[Tensor], Tensor]) -> None:
    case = Case(lambda m, x: step((x @ m.a).relu()) @ m.b, {"a": (6, 8), "b": (8, 3)}, "8: a.1 b.0")
    check(case, torch.rand(EDGES, 6))


MASKED: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda x: x[TO > 0],
    "of two dimensions": lambda x: x.view(3, NODES, 8)[TO.view(3, NODES) > 0],
}


@pytest.mark.parametrize("step", MASKED.values(), ids=MASKED.keys())
def test_features_of_as_many_messages_as_a_mask_lets_through(step: Callable[[Tensor], Tensor]) -> None:
    case = Case(lambda m, x: step((x @ m.a).relu()) @ m.b, {"a": (6, 8), "b": (8, 3)}, "8: a.1 b.0")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        check(case, torch.rand(EDGES, 6))


def test_zeros_that_layers_share_do_not_couple_them() -> None:
    def messages(m: Any, x: Tensor) -> Tensor:
        x = x @ m.stem
        zeros = x.new_zeros(EDGES, 8)
        for up, down in ((m.up, m.down), (m.up2, m.down2)):
            x = x + zeros.index_add(0, TO, (x @ up).relu()) @ down
        return x @ m.head

    shapes = {"stem": (6, 4), "up": (4, 8), "down": (8, 4), "up2": (4, 8), "down2": (8, 4), "head": (4, 3)}
    stream = "4: stem.1 up.0 down.1 up2.0 down2.1 head.0"
    check(Case(messages, shapes, f"{stream} | 8: up.1 down.0 | 8: up2.1 down2.0"), torch.rand(EDGES, 6))


def test_bags_of_a_weight_are_an_embedding() -> None:
    def bags(m: Any, x: Tensor) -> Tensor:
        return F.embedding_bag(x.argsort(-1), m.table, mode="mean") @ m.a

    found = explained(Case(bags, {"table": (6, 8), "a": (8, 3)}, ""), torch.rand(EDGES, 6))
    assert (couplings(found), dict(found.untraced)) == (["8: a.0 table.1"], {})
    assert {group.kind for group in found.groups if any(s.param == "table" for s in group.slices)} == {"tokens"}


ADDED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index_add": lambda x, y: x.index_add(0, TO, y),
    "scatter_add": lambda x, y: x.scatter_add(0, across(y), y),
    "scatter_reduce": lambda x, y: x.scatter_reduce(0, across(y), y, "sum"),
    "index_put": lambda x, y: x.index_put((TO,), y, accumulate=True),
}  # fmt: skip


@pytest.mark.parametrize("add", ADDED.values(), ids=ADDED.keys())
def test_messages_that_are_added_to_what_they_came_from_make_a_stream(add: Callable[[Tensor, Tensor], Tensor]) -> None:
    def layer(m: Any, x: Tensor) -> Tensor:
        x = x @ m.stem
        return add(x, (x @ m.up).relu() @ m.down) @ m.head

    shapes = {"stem": (6, 4), "up": (4, 8), "down": (8, 4), "head": (4, 3)}
    found = explained(Case(layer, shapes, ""), torch.rand(EDGES, 6))
    assert couplings(found) == ["4: down.1 head.0 stem.1 up.0", "8: down.0 up.1"]
    assert [axis.kind for axis in found.axes if ("stem", 1) in axis.members] == ["stream"]
    assert found.untraced == {}


UNTRACED: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "rolled": (lambda x: x.roll(1, -1), 8),
    "flipped": (lambda x: x.flip(-1), 8),
    "sorted": (lambda x: x.sort(-1).values, 8),
    "padded": (lambda x: F.pad(x, (0, 1)), 9),
    "looked up by constants": (lambda x: x[..., torch.arange(2)], 2),
    "selected by constants": (lambda x: x.index_select(-1, torch.tensor([3, 1])), 2),
    "gathered by constants": (lambda x: x.gather(-1, torch.tensor([3, 1]).expand(EDGES, 2)), 2),
    "added along the features": (lambda x: x.new_zeros(EDGES, 4).index_add(1, torch.arange(8) % 4, x), 4),
    "put along the features": (lambda x: x.new_zeros(EDGES, 8).scatter(1, torch.arange(8).expand(EDGES, 8), x), 8),
    "put by a mask": (lambda x: torch.zeros(EDGES, 8).masked_scatter(torch.eye(EDGES, 8) < 1, x), 8),
    "taken": (lambda x: x.take(torch.arange(EDGES * 8).view(EDGES, 8)), 8),
    "put": (lambda x: torch.zeros(EDGES, 8).put(torch.arange(EDGES * 8).view(EDGES, 8), x), 8),
    "transformed": (lambda x: torch.fft.fft(x).real, 8),
    "the greatest so far": (lambda x: x.cummax(-1).values, 8),
    "distances": (lambda x: torch.cdist(x, torch.rand(5, 8)), 5),
    "inverted": (lambda x: torch.linalg.inv(x[:8] + 8 * torch.eye(8)), 8),
    "unfolded": (lambda x: x.unfold(-1, 4, 1).sum(-1), 5),
    "strided": (lambda x: x.as_strided((EDGES, 4), (8, 2)), 4),
}  # fmt: skip


@pytest.mark.parametrize(("step", "rows"), UNTRACED.values(), ids=UNTRACED.keys())
def test_what_is_not_followed_is_named(step: Callable[[Tensor], Tensor], rows: int) -> None:
    """Where features are others afterwards, the operation is told of, and theirs are no outputs that nothing reads."""
    case = Case(lambda m, x: step(x @ m.a) @ m.b, {"a": (6, 8), "b": (rows, 3)}, "")
    found = explained(case, torch.rand(EDGES, 6))
    assert found.untraced or couplings(found), "the walk ended in silence"
    assert not [g for g in found.groups if g.kind == "outputs" and any(s.param == "a" for s in g.slices)]


PICKED: dict[str, Callable[[Tensor], Tensor]] = {
    "the best": lambda x: x.topk(2).values,
    "one class a row": lambda x: x.log_softmax(-1).gather(1, x.argmax(-1, keepdim=True)),
    "one class a row, indexed": lambda x: x.log_softmax(-1)[torch.arange(EDGES), x.argmax(-1)],
    "a shift for each row": lambda x: x.gather(1, (torch.arange(EDGES)[:, None] + torch.arange(4)) % 8),
    "the loss": lambda x: F.cross_entropy(x, x.argmax(-1)),
    "the greatest": lambda x: x.amax(-1),
}  # fmt: skip


@pytest.mark.parametrize("step", PICKED.values(), ids=PICKED.keys())
def test_outputs_that_are_picked_by_values_are_outputs(step: Callable[[Tensor], Tensor]) -> None:
    found = explained(Case(lambda m, x: step(x @ m.a), {"a": (6, 8)}, ""), torch.rand(EDGES, 6))
    assert found.untraced == {}
    assert {group.kind for group in found.groups if any(s.param == "a" for s in group.slices)} == {"outputs"}
