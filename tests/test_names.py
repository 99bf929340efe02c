"""Names of families and groups, made of the names of their weights."""

import pytest

from cacompile.names import Named, family_names, group_name, module_of


def named(kind: str, *weights: str, makers: int | None = None) -> Named:
    """Of these weights, the first `makers` make it; by default all but the last."""
    return Named(kind, weights[: len(weights) - 1 if makers is None else makers], weights)


ALONE = {
    "the module that has all weights": (
        named("neurons", "layers.3.mlp.up.weight", "layers.3.mlp.gate.weight", "layers.3.mlp.down.weight"),
        "layers.3.mlp.neurons",
    ),
    "the one that makes it, of filters": (
        named("filters", "layer1.0.conv1.weight", "layer1.0.conv2.weight"),
        "layer1.0.conv1.filters",
    ),
    "one weight": (named("rows", "fc.weight"), "fc.rows"),
    "a parameter with a name of its own": (named("rows", "place"), "place.rows"),
    "the model itself": (named("neurons", "weight"), "neurons"),
    "nothing in common": (named("neurons", "up.weight", "down.weight"), "up.neurons"),
    "a module called like its kind": (
        named("experts", "moe.experts.gate_up_proj", "moe.experts.down_proj"),
        "moe.experts",
    ),
    "a parametrized weight": (named("rows", "fc.parametrizations.weight.original1"), "fc.rows"),
}


@pytest.mark.parametrize(("family", "name"), ALONE.values(), ids=ALONE.keys())
def test_a_family_by_itself(family: Named, name: str) -> None:
    assert family_names([family]) == [name]


def test_the_innermost_module_that_has_no_other_of_the_kind() -> None:
    """Two MLPs in one block: its name would be both's."""
    first = named("neurons", "block.a.weight", "block.b.weight")
    second = named("neurons", "block.c.weight", "block.d.weight")
    heads = named("heads", "block.q.weight", "block.o.weight")
    assert family_names([first, second, heads]) == ["block.a.neurons", "block.c.neurons", "block.heads"]


def test_names_differ() -> None:
    """Two axes of one weight, both rows."""
    names = family_names([named("rows", "fc.weight")] * 3)
    assert names == ["fc.rows", "fc.rows#2", "fc.rows#3"]


def test_order_changes_no_name() -> None:
    families = [named("neurons", f"layers.{i}.up.weight", f"layers.{i}.down.weight") for i in range(12)]
    names = dict(zip(families, family_names(families)))
    assert dict(zip(families[::-1], family_names(families[::-1]))) == names
    assert names[families[1]] == "layers.1.neurons" != names[families[11]]


@pytest.mark.parametrize(
    ("start", "stop", "name"), [(0, 128, "mlp.neurons[0:128]"), (7, 8, "mlp.neurons[7]"), (0, 1, "mlp.neurons[0]")]
)
def test_groups(start: int, stop: int, name: str) -> None:
    assert group_name("mlp.neurons", start, stop) == name


@pytest.mark.parametrize(
    ("param", "module"),
    [
        ("layers.0.fc.weight", "layers.0.fc"),
        ("layers.0.fc.bias", "layers.0.fc.bias"),
        ("weight", ""),
        ("experts.gate_up_proj", "experts.gate_up_proj"),
        ("fc.parametrizations.weight.original0", "fc"),
    ],
)
def test_module_of_a_parameter(param: str, module: str) -> None:
    assert module_of(param) == module
