"""Zeros in all slices of a group take out that unit and nothing else, whatever the architecture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn
from zoo_small import explained, made

import cacompile
from benchmarks.zoo import custom
from benchmarks.zoo.units import check_units

ENDS = {
    "gpt2": {"heads": 4, "neurons": 4},
    "llama": {"heads": 4, "neurons": 4},
    "mixtral": {"heads": 4, "experts": 4},
    "bert": {"heads": 4, "neurons": 4},
    "vit": {"heads": 4, "neurons": 4, "filters": 2},
    "resnet18": {"filters": 40},
    "convnext": {"neurons": 8, "filters": 14},
}
"""Kind -> groups: the first and the last of each family."""


@pytest.mark.parametrize("name", ENDS)
def test_zeros_take_out_a_unit(name: str) -> None:
    model = made(name)
    found = check_units(model.module, (), model.inputs, explained(name).groups)
    assert {kind: (of_kind.wrong, of_kind.apart) for kind, of_kind in found.items()} == dict.fromkeys(found, ([], {}))
    assert {kind: of_kind.exact for kind, of_kind in found.items()} == ENDS[name]


CUSTOM: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "einsums": (lambda: custom.einsum_transformer(32, 2, 64, 1, 50), {"neurons": 4}),
    "experts in a list": (lambda: custom.mixture(custom.ListMoE, 32, 2, 64, 3, 50), {"neurons": 8}),
    "experts in one weight": (
        lambda: custom.mixture(custom.EinsumMoE, 32, 2, 64, 3, 50),
        {"experts": 2, "neurons": 2},
    ),
}
"""Kind -> groups. Heads are left out: einsum makes the gradient of `out` with the rows of one head far apart, so it is
cut by entries instead, and what reads the heads is in none of their groups."""


@pytest.mark.parametrize(("make", "exact"), CUSTOM.values(), ids=CUSTOM.keys())
def test_zeros_take_out_a_unit_of_einsums_and_lists(make: Callable[[], nn.Module], exact: dict[str, int]) -> None:
    model, inputs = make(), (torch.randint(50, (2, 8)),)
    found = check_units(model, inputs, {}, cacompile.explain(model, *inputs, options={"block_rows": 16}).groups)
    assert not [name for of_kind in found.values() for name in of_kind.wrong]
    assert {kind: of_kind.exact for kind, of_kind in found.items() if of_kind.checked} == exact


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_groups_that_are_no_units_are_told(name: str) -> None:
    """Slices of one unit beside those of another: every such group must be found out."""
    model = made(name)
    ends = [g for g in explained(name).groups if g.name.endswith((".heads[0]", ".neurons[0:32]", ".experts[0]"))]
    mixed = []
    for group in ends:
        size = group.slices[0].stop - group.slices[0].start
        moved = dataclasses.replace(group.slices[0], start=size, stop=2 * size)
        mixed.append(dataclasses.replace(group, slices=(moved, *group.slices[1:])))
    found = check_units(model.module, (), model.inputs, mixed)
    assert [of_kind.exact for of_kind in found.values()] == [0] * len(found) == [0, 0]
