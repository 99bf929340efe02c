"""What a user may set, and what is said of anything else."""

from __future__ import annotations

from dataclasses import fields
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass

import cacompile
from cacompile import Config, ConvAwareError
from cacompile.errors import shown
from cacompile.settings import MODES

LIMITS = {  # option -> values allowed at the edges, values just beyond
    "tolerance": ([0, 0.0, 1.0], [-0.01, 1.01, float("nan")]),
    "budget": ([0.0, 1], [-0.01, 1.01]),
    "max_skip": ([0.0, 1], [-0.01, 1.01]),
    "warmup_steps": ([0, 10**9], [-1]),
    "monitor_every": ([1], [0]),
    "max_age": ([1], [0]),
    "max_truncated": ([0, 1], [-1]),
    "block_rows": ([1, 65536], [0, -128, 65537]),
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
        assert option.name in LIMITS or option.metadata["choices"] or option.metadata["patterns"], option.name
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


@pytest.mark.parametrize("option", [option.name for option in fields(Config) if option.metadata["low"] is not None])
@pytest.mark.parametrize(
    "value", [2**70, 10**400, 10**5000, np.inf, -np.inf, np.nan, np.True_, 1j, torch.ones(2)], ids=shown
)
def test_numbers_beyond_all_ranges(option: str, value: Any):
    with pytest.raises(ConvAwareError, match=rf"convaware option '{option}' must be (of type|between|>=) .*, got "):
        Config(**{option: value})


def test_the_largest_is_named_where_a_number_is_too_large():
    with pytest.raises(ConvAwareError, match=f"'seed' must be between 0 and {2**64 - 1}, got {2**70}"):
        Config(seed=2**70)
    with pytest.raises(ConvAwareError, match=f"'max_age' must be between 1 and {2**63 - 1}, got {2**63}"):
        Config(max_age=2**63)


def test_numbers_of_other_libraries_become_pythons_own():
    config = Config(seed=np.int64(3), tolerance=np.float32(0.5), max_skip=Fraction(1, 2))
    assert config == Config(seed=3, tolerance=0.5, max_skip=0.5)
    assert (type(config.seed), type(config.tolerance), type(config.max_skip)) == (int, float, float)


@pytest.mark.parametrize("inner", ["inductor", "aot_eager"])
def test_the_largest_numbers_train(inner: str, caplog: pytest.LogCaptureFixture):
    steps = {**dict.fromkeys(["warmup_steps", "monitor_every", "max_age"], 2**63 - 1), "block_rows": 65536}
    for options in (steps, {**steps, "warmup_steps": 0, "monitor_every": 1}, {"seed": 2**64 - 1, "warmup_steps": 0}):
        torch._dynamo.reset()
        model = nn.Linear(32, 32)
        optimizer = torch.optim.AdamW(model.parameters())
        run = torch.compile(model, backend="convaware", options={"block_rows": 16, **options, "inner": inner})
        for _ in range(3):
            run(torch.ones(2, 32)).sum().backward()
            optimizer.step()
        cacompile.session(model).load_state_dict(cacompile.session(model).state_dict())
        assert cacompile.session(model).bindings and model.weight.isfinite().all()
        assert "Traceback" not in caplog.text and "failed" not in caplog.text


WRONG_OPTIONS = [
    (["tolerance"], ["options must be a dict", "['tolerance']"]),
    ("tolerance", ["options must be a dict", "'tolerance'"]),
    (3, ["options must be a dict", "got 3"]),
    ([("seed", 1)], ["options must be a dict", "('seed', 1)"]),
    ({1: 2}, ["names of options", "str", "got 1"]),
    ({"toleranse": 1}, ["'toleranse'", "did you mean 'tolerance'?"]),
    ({"seed": 10**400}, ["'seed'", "between 0 and"]),
    ({"max_autotune": "yes"}, ["max_autotune", "bool", "str"]),
    ({"max_autotune": True, "inner": "aot_eager"}, ["'max_autotune'", "Inductor's", "allowed"]),
]


@pytest.mark.parametrize(("options", "words"), WRONG_OPTIONS, ids=shown)
@pytest.mark.parametrize("front", ["compile", "explain", "explain what has run", "broken torch"])
def test_wrong_options_are_one_clear_error_everywhere(
    front: str, options: Any, words: list[str], monkeypatch: pytest.MonkeyPatch
):
    model, x = nn.Linear(4, 4), torch.ones(1, 4)
    if front == "broken torch":
        if "autotun" in str(options) or "toleranse" in str(options):
            pytest.skip("Inductor's own, which is asked")
        monkeypatch.setattr("cacompile.backend.broken_contracts", lambda _: ["something"])
    if front == "explain what has run":
        torch.compile(model, backend="convaware", options={"inner": "aot_eager"})(x)
    with pytest.raises(ConvAwareError) as error:
        if front in ("compile", "broken torch"):
            torch.compile(model, backend="convaware", options=options)(x)
        else:
            cacompile.explain(model, *([] if "run" in front else [x]), options=options)
    assert all(word in str(error.value) for word in words), error.value


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
