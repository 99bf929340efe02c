"""What must hold of the groups of any model, tried on models out of a grammar."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from random_models import Drawn, Net, Spec, interpreted, nets, tokens

import cacompile
from cacompile.explanation.explain import Explanation

OPTIONS = {"block_rows": 8}
few = settings(derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), max_examples=5)
often = settings(few, max_examples=50)


def explained(model: Net) -> Explanation:
    torch._dynamo.reset()
    return cacompile.explain(model, tokens(), options=OPTIONS)


@few
@given(nets)
def test_groups_part_every_parameter(drawn: Drawn) -> None:
    found = explained(Net(*drawn))
    assert found.graphs == 1
    pieces: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for group in found.groups:
        assert len(set(group.slices)) == len(group.slices) > 0
        for piece in group.slices:
            pieces[piece.param].append((piece.dim, piece.start, piece.stop))
    assert len({group.name for group in found.groups}) == len(found.groups)
    for row in found.rows:
        cut = sorted(pieces[row.param])
        assert len({dim for dim, *_ in cut}) <= 1
        assert all(0 <= start < stop <= row.shape[dim] for dim, start, stop in cut)
        assert all(before <= start for (_, _, before), (_, start, _) in itertools.pairwise(cut))
        if row.operation:
            size = row.shape[cut[0][0]]
            assert sum(stop - start for _, start, stop in cut) == size
            # a block has rows of one group only
            assert all(start % row.block == 0 and (stop % row.block == 0 or stop == size) for _, start, stop in cut)
    masked = [row for row in found.rows if row.operation]
    assert sum(group.flops for group in found.groups) == sum(row.flops for row in masked)


@settings(few, max_examples=3)
@given(nets)
def test_order_plays_no_part(drawn: Drawn) -> None:
    """Parameters that were made, and so are numbered, the other way round; branches that are called so, too."""
    width, specs, tied = drawn
    turned = [spec._replace(variant=spec.variant ^ 1) if spec.kind == "branches" else spec for spec in specs]
    one, two = explained(Net(*drawn)), explained(Net(width, turned, tied, backwards=True))
    slices = [
        {g.name: (g.kind, g.role_hash, g.flops, frozenset(g.slices)) for g in found.groups} for found in (one, two)
    ]
    assert slices[0] == slices[1]


@settings(few, max_examples=3)
@given(nets)
def test_pins_are_masks_of_slices(drawn: Drawn) -> None:
    torch._dynamo.reset()
    model = Net(*drawn)
    slices = {g.name: g.slices for g in explained(model).groups if g.flops}
    model(tokens())
    compiled = interpreted(model, **OPTIONS)
    compiled(tokens()).sum().backward()
    session = cacompile.session(model)
    assert set(session.groups) == set(slices)
    mask = torch.rand(len(session.groups)) < 0.5
    session.pin(mask.tolist())
    assert torch.equal(session.mask, mask)
    for name in session.groups[:: max(1, len(slices) // 6)]:
        session.pin({name: False})
        expected = {(s.param, s.dim, i) for s in slices[name] for i in range(s.start, s.stop)}
        off = set()
        for param, record in session.params.items():
            if cut := record.partition:
                rows = record.on.repeat(cut.block)[: cut.rows]
                off |= {(param, cut.dim, i) for i, on in enumerate(rows) if not on}
        assert off == {entry for entry in expected if session.params[entry[0]].partition}
        assert session.mask.tolist() == [other != name for other in session.groups]


def test_a_pin_reaches_the_gradients() -> None:
    """The rows that a group is made of have zeros for gradients, all others what they had."""
    model = Net(16, [Spec("gated", 24, 1)], tied=False)
    compiled = interpreted(model, **OPTIONS)
    grads = []
    session = cacompile.session(model)
    name = "block0.neurons[8:16]"
    for pin in (None, {name: False}):
        model.zero_grad()
        compiled(tokens()).square().sum().backward()
        if pin is None:
            session.pin({name: False})
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    [group] = [g for g in explained(model).groups if g.name == name]
    for piece in group.slices:
        if len(grads[0][piece.param].shape) > 1:
            assert not grads[1][piece.param].narrow(piece.dim, piece.start, piece.stop - piece.start).any()
            grads[0][piece.param].narrow(piece.dim, piece.start, piece.stop - piece.start).zero_()
    for param in grads[0]:
        torch.testing.assert_close(grads[1][param], grads[0][param])


@pytest.mark.slow
@pytest.mark.parametrize(
    "test", [test_groups_part_every_parameter, test_order_plays_no_part, test_pins_are_masks_of_slices]
)
def test_more_models(test: Any) -> None:
    often(given(nets)(test.hypothesis.inner_test))()
