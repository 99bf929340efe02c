"""Groups of Mamba 2, in which one weight makes gates, inputs, states and time steps side by side."""

from __future__ import annotations

import functools

import pytest
import torch
from zoo_small import slices_of

import cacompile
from benchmarks.zoo.units import check_units
from cacompile.explanation.explain import Explanation

transformers = pytest.importorskip("transformers")

WIDTH, STATE, HEADS, ENTRIES = 128, 32, 8, 32
INNER = HEADS * ENTRIES


@functools.cache
def made(groups: int) -> torch.nn.Module:
    """groups: of heads, with states and a norm for each."""
    torch.manual_seed(0)
    config = transformers.Mamba2Config(
        vocab_size=300, hidden_size=WIDTH, num_hidden_layers=2, state_size=STATE, head_dim=ENTRIES, num_heads=HEADS,
        n_groups=groups, chunk_size=8, use_cache=False, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return transformers.Mamba2ForCausalLM(config)


INPUTS = {"input_ids": torch.arange(32).view(2, 16), "use_cache": False}


def explained(model: torch.nn.Module, block_rows: int) -> Explanation:
    return cacompile.explain(model, options={"block_rows": block_rows}, **INPUTS)


@pytest.mark.thin(2)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("block_rows", [16, 64, 128])
def test_all_but_the_time_steps_are_in_groups_with_a_meaning(block_rows: int, groups: int) -> None:
    found = explained(made(groups), block_rows)
    assert (found.coverage, dict(found.untraced)) == (pytest.approx(1.0), {})
    plain = [group for group in found.groups if group.kind == "rows"]
    assert {(g.family, sum(s.stop - s.start for s in g.slices)) for g in plain} == {
        (f"backbone.layers.{i}.mixer.in_proj.rows", HEADS) for i in range(2)
    }
    assert found.semantic == pytest.approx(1.0 - sum(group.share for group in plain))
    assert found.semantic > 0.98


def test_heads_go_through_all_of_the_layer() -> None:
    """Gates, inputs, filters, norm and columns of the last weight; time steps, a row a head, are rows of their own."""
    found = explained(made(1), 32)
    mixer = "backbone.layers.0.mixer"
    wide, states = (96, 128), 2 * INNER
    groups = {group.name.removeprefix(f"{mixer}."): slices_of(group) for group in found.groups}
    weights = [("in_proj.weight", 0, *wide), ("in_proj.weight", 0, INNER + wide[0], INNER + wide[1])]
    weights += [("conv1d.weight", 0, *wide), ("out_proj.weight", 1, *wide)]
    vectors = [("conv1d.bias", 0, *wide), ("norm.weight", 0, *wide), *((f, 0, 3, 4) for f in ("A_log", "dt_bias", "D"))]
    assert groups["heads[3]"] == {(f"{mixer}.{name}", *rest) for name, *rest in (*weights, *vectors)}
    in_proj, conv = f"{mixer}.in_proj.weight", f"{mixer}.conv1d"
    assert groups[f"neurons[0:{STATE}]"] == {
        (in_proj, 0, states, states + 2 * STATE),
        (f"{conv}.weight", 0, INNER, INNER + 2 * STATE),
        (f"{conv}.bias", 0, INNER, INNER + 2 * STATE),
    }
    assert groups[f"in_proj.rows[0:{HEADS}]"] == {(in_proj, 0, states + 2 * STATE, states + 2 * STATE + HEADS)}


def test_zeros_take_out_heads_that_are_normed_apart() -> None:
    """With a norm for each half of the heads, which groups of 128 rows are."""
    model = made(2)
    checked = check_units(model, (), INPUTS, explained(model, 128).groups)
    assert (checked["heads"].exact, checked["heads"].wrong) == (4, [])
