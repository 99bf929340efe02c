"""What a user may set, and what is said of anything else."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass

import cacompile
from cacompile import Config, ConvAwareError
from cacompile.backend import MODES

LIMITS = {  # option -> values allowed at the edges, values just beyond
    "tolerance": ([0, 0.0, 1.0], [-0.01, 1.01, float("nan")]),
    "max_skip": ([0.0, 1], [-0.01, 1.01]),
    "warmup_steps": ([0, 10**9], [-1]),
    "monitor_every": ([1], [0]),
    "max_age": ([1], [0]),
    "block_rows": ([1, 4096], [0, -128]),
    "seed": ([0, 2**63], [-1]),
}


def compiled(**settings: Any) -> Any:
    return torch.compile(nn.Linear(4, 4), backend="convaware", **settings)


@pytest.mark.parametrize("option", LIMITS)
def test_ranges(option: str):
    allowed, beyond = LIMITS[option]
    for value in allowed:
        assert getattr(Config(**{option: value}), option) == value
    for value in beyond:
        with pytest.raises(ConvAwareError, match=rf"convaware option '{option}' must be .*, got {value}$"):
            Config(**{option: value})


def test_every_option_has_limits_and_a_description():
    for option in fields(Config):
        assert option.name in LIMITS or option.metadata["choices"], option.name
        assert option.metadata["doc"].endswith("."), option.name


@pytest.mark.parametrize(
    ("option", "value", "kind"),
    [
        ("tolerance", "0.3", "float"),
        ("tolerance", True, "float"),
        ("warmup_steps", 2.0, "int"),
        ("warmup_steps", False, "int"),
        ("seed", None, "int"),
        ("estimate", 3, "str"),
    ],
)
def test_types(option: str, value: Any, kind: str):
    with pytest.raises(ConvAwareError, match=f"'{option}' must be of type {kind}, got {value!r}"):
        Config(**{option: value})


def test_a_choice_that_does_not_exist():
    with pytest.raises(
        ConvAwareError, match=r"'estimate': 'momentun'; did you mean 'momentum'\? known: momentum, zeros"
    ):
        Config(estimate="momentun")


def test_a_config_is_a_key():
    assert {Config(), Config(tolerance=0.05)} == {Config()} != {Config(seed=1)}
    with pytest.raises(AttributeError):
        Config().seed = 2  # type: ignore[misc]


def test_no_option_has_the_name_of_one_of_inductors():
    assert not {option.name for option in fields(Config)} & set(inductor_config.get_config_copy())


def test_options_are_split():
    config, rest = Config.from_options({"seed": 3, "max_autotune": True})
    assert config == Config(seed=3) and rest == {"max_autotune": True}
    assert Config.from_options(None) == (Config(), {})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"options": {"tolerence": 0.1}}, ["'tolerence'", "did you mean 'tolerance'?"]),
        ({"options": {"max_autotun": True}}, ["'max_autotun'", "did you mean 'max_autotune'?"]),
        ({"options": {"tolerance": 2}}, ["'tolerance'", "between 0.0 and 1.0", "got 2"]),
        ({"options": {"warmup_steps": -5}}, ["'warmup_steps'", ">= 0", "got -5"]),
        ({"options": {"max_autotune": "yes"}}, ["max_autotune", "bool", "str"]),
        ({"mode": "max-autotun"}, ["'max-autotun'", "did you mean 'max-autotune'?", *MODES]),
    ],
    ids=str,
)
def test_through_torch_compile_a_wrong_setting_is_a_value_error(settings: dict[str, Any], words: list[str]):
    with pytest.raises(ValueError) as error:
        compiled(**settings)(torch.ones(1, 4))
    assert all(word in str(error.value) for word in words), error.value


def test_after_an_error_the_model_can_be_compiled_rightly():
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="tolerance"):
        torch.compile(model, backend="convaware", options={"tolerance": 2.0})(torch.ones(1, 4))
    torch.compile(model, backend="convaware", options={"tolerance": 0.2})(torch.ones(1, 4)).sum().backward()
    assert model.weight.grad is not None


@pytest.mark.parametrize(
    ("settings", "seen"),
    [
        ({"options": {"seed": 1, "epilogue_fusion": False}}, {"epilogue_fusion": False}),
        ({"options": {"epilogue-fusion": False}}, {"epilogue_fusion": False}),
        ({"mode": "max-autotune-no-cudagraphs"}, {"max_autotune": True}),
        ({"mode": "default"}, {"max_autotune": False}),
        ({}, {"epilogue_fusion": True}),
    ],
    ids=str,
)
def test_inductors_options_are_in_force_while_each_version_is_compiled(settings: dict[str, Any], seen: dict[str, Any]):
    found: list[dict[str, Any]] = []

    class Watch(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            found.append({name: getattr(inductor_config, name) for name in seen})

        def uuid(self) -> None:
            """None: never from a cache."""

    model = nn.Linear(16, 16)
    run = torch.compile(model, backend="convaware", **settings)
    with inductor_config.patch(post_grad_custom_post_pass=Watch()):
        run(torch.ones(8, 16)).sum().backward()
        cacompile.session(model).pin(keep=0.0)
        run(torch.ones(8, 16)).sum().backward()
    assert found == [seen] * 3  # forward, dense, masked
