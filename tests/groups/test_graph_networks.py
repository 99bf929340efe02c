"""Groups of graph networks: hidden units of messages are those of what reads them after they were added up at nodes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import cacompile
from benchmarks.zoo.units import check_units

WIDTH, HIDDEN, NODES, EDGES = 32, 64, 10, 24

Sum = Callable[[Tensor, Tensor], Tensor]


def _nodes(messages: Tensor) -> Tensor:
    return messages.new_zeros(NODES, messages.shape[-1])


def _across(to: Tensor, messages: Tensor) -> Tensor:
    return to[:, None].expand_as(messages)


SUMS: dict[str, Sum] = {
    "index_add": lambda messages, to: _nodes(messages).index_add(0, to, messages),
    "scatter_add": lambda messages, to: _nodes(messages).scatter_add_(0, _across(to, messages), messages),
    "scatter_reduce": lambda messages, to: _nodes(messages).scatter_reduce(0, _across(to, messages), messages, "mean"),
    "index_put": lambda messages, to: _nodes(messages).index_put((to,), messages, accumulate=True),
}


class Passing(nn.Module):
    """One round: a message along each edge, added up at the nodes, which read the sums."""

    def __init__(self, add_up: Sum) -> None:
        super().__init__()
        self.add_up = add_up
        self.message = nn.Linear(2 * WIDTH, HIDDEN)
        self.update = nn.Sequential(nn.Linear(WIDTH + HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        start, to = edges
        messages = self.message(torch.cat((x[start], x.index_select(0, to)), -1)).relu()
        return x + self.update(torch.cat((x, self.add_up(messages, to)), -1))


class Network(nn.Module):
    """Rounds between a stem and a head."""

    def __init__(self, add_up: Sum) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 4)
        self.rounds = nn.ModuleList(Passing(add_up) for _ in range(2))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = self.stem(x)
        for passing in self.rounds:
            x = passing(x, edges)
        return self.head(x)


@pytest.mark.parametrize("add_up", SUMS.values(), ids=SUMS.keys())
def test_units_of_messages_are_neurons(add_up: Sum) -> None:
    torch.manual_seed(0)
    model, inputs = Network(add_up), (torch.randn(NODES, 8), torch.randint(NODES, (2, EDGES)))
    found = cacompile.explain(model, *inputs, options={"block_rows": 16})
    families = {group.family: group.kind for group in found.groups}
    assert {name: kind for name, kind in families.items() if name.startswith("rounds.")} == {
        f"rounds.{i}.{part}.neurons": "neurons" for i in range(2) for part in ("message", "update")
    }
    assert found.untraced == {}
    for i in range(2):
        name = f"rounds.{i}.message.neurons[0:16]"
        [group] = [group for group in found.groups if group.name == name]
        assert [(s.param.removeprefix(f"rounds.{i}."), s.dim, s.start, s.stop) for s in group.slices] == [
            ("message.weight", 0, 0, 16),
            ("message.bias", 0, 0, 16),
        ]
    checked = check_units(model, inputs, {}, found.groups)
    assert (checked["neurons"].exact, checked["neurons"].wrong) == (8, [])
