"""Weights and inputs of tensor subclasses: they stay dense, and all beside them can be skipped as ever."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import OPTIONS, Block, assert_masked, assert_same, compile_all, masks, pin_mixed, train_step
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import swap_tensors  # by name, before anything is compiled

import cacompile
from cacompile.torch_internals import release

EAGER: dict[str, Any] = {"options": {"inner": "aot_eager"}}


class _Linear(torch.autograd.Function):
    """A linear layer of a quantised weight whose gradient is a plain tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ (weight.values * weight.scale).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return grad @ (weight.values * weight.scale), grad.flatten(0, -2).t() @ x.flatten(0, -2)


class Scaled(torch.Tensor):
    """Values and a scale: two inner tensors, as quantised training has."""

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self.values, self.scale = values, scale

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Scaled{tuple(self.shape)}"

    def _stable_hash_for_caching(self) -> str:
        return repr(self)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], meta: None, size: Any, stride: Any) -> Any:
        return cls(inner["values"], inner["scale"])

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear:
            out = _Linear.apply(*args[:2])
            return out if len(args) < 3 or args[2] is None else out + args[2]
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        allowed = torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.clone.default
        assert function in allowed, function
        return cls(function(args[0].values), function(args[0].scale))


def scaled(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(Scaled(torch.randn(rows, columns), torch.full((), 0.1)))


def stack(subclassed: list[bool], width: int = 32) -> nn.Sequential:
    """Linear layers, some with weights of a subclass, and activations between."""
    layers: list[nn.Module] = []
    for is_scaled in subclassed:
        linear = nn.Linear(width, width)
        if is_scaled:
            linear.weight = scaled(width, width)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers)


def of_subclass(model: nn.Module) -> set[str]:
    return {name for name, param in model.named_parameters() if isinstance(param, Scaled)}


def check(subclassed: list[bool], inner: str, caplog: pytest.LogCaptureFixture | None = None) -> None:
    """As the inner compiler while all is on, masked as told afterwards; the subclasses dense, each with the reason."""
    torch._dynamo.reset()
    ours = stack(subclassed)
    theirs = copy.deepcopy(ours)
    for name, param in ours.named_parameters():  # deepcopy of a subclass may share
        if name in of_subclass(ours):
            theirs.get_submodule(name.rpartition(".")[0]).weight = nn.Parameter(
                Scaled(param.values.clone(), param.scale.clone())
            )
    x = [torch.randn(8, 32, requires_grad=True)]
    dense = train_step((theirs, torch.compile(theirs, backend=inner)), x)
    call = compile_all(ours, "convaware", options={"inner": inner})
    assert_same(train_step((ours, call), x), dense)
    session = cacompile.session(ours)
    plain = {f"{2 * i}.weight" for i, is_scaled in enumerate(subclassed) if not is_scaled}
    assert set(masks(ours)) == plain
    if plain:
        reasons = {row.param: row.reason for row in cacompile.explain(ours).rows}
        assert all("is a Scaled, a tensor subclass" in reasons[name] for name in of_subclass(ours))
        session.pin(keep=0.0)
        assert_masked(train_step((ours, call), x), dense, masks(ours))
        assert any(binding.masked_backwards for binding in session.bindings)


@pytest.mark.parametrize(
    "subclassed", [[False, True, False], pytest.param([True, True], marks=pytest.mark.slow)], ids=str
)
def test_what_is_beside_a_subclass_is_skipped(subclassed: list[bool], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check(subclassed, "inductor")
    assert "failed at" not in caplog.text


def test_its_products_count_as_dense() -> None:
    model = stack([False, True, False])
    compile_all(model, "convaware", **EAGER)(torch.randn(8, 32)).sum().backward()
    shares = {row.param: row.share for row in cacompile.explain(model).rows if row.share}
    assert shares == pytest.approx({"0.weight": 1 / 3, "2.weight": 1 / 3, "4.weight": 1 / 3})


def test_an_input_that_is_a_subclass() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor, table: Any) -> Tensor:
            return self.block(F.linear(x, table))

    model = Reads()
    call = compile_all(model, "convaware", **EAGER)
    table = Scaled(torch.randn(32, 32), torch.full((), 0.1))
    call(torch.randn(8, 32), table).sum().backward()
    cacompile.session(model).pin(keep=0.0)
    model.zero_grad()
    call(torch.randn(8, 32), table).sum().backward()
    assert not model.block.up.weight.grad.any() and model.block.up.bias.grad.any()


def test_parametrized_weights() -> None:
    """What is trained is behind the parametrization; the graph computes the weight from it."""
    model = Block()
    nn.utils.parametrizations.weight_norm(model.up)
    call = compile_all(model, "convaware", **EAGER)
    call(torch.randn(8, 32)).sum().backward()
    names = set(masks(model))
    assert "up.parametrizations.weight.original1" in names and "down.weight" in names
    cacompile.session(model).pin(keep=0.0)
    model.zero_grad()
    call(torch.randn(8, 32)).sum().backward()
    assert not model.up.parametrizations.weight.original1.grad.any()


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(subclassed=st.lists(st.booleans(), min_size=1, max_size=5))
def test_any_mixture(subclassed: list[bool]) -> None:
    check(subclassed, "aot_eager")


@pytest.mark.parametrize("convert", ["double", "half weights are swapped", "load_state_dict", "swap_tensors"])
def test_contents_can_be_swapped(convert: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses to swap tensors that have weak references; ours are let go, and groups follow the parameter."""
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    model = Block()
    call = torch.compile(model, backend="convaware", options={**OPTIONS, **EAGER["options"]})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    call(torch.randn(8, 32)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    session = cacompile.session(model)
    pin_mixed(session)
    before, mask = {name: state.on.copy() for name, state in session.params.items()}, session.mask
    dtype = torch.float32
    if convert == "double":
        model.double()
        dtype = torch.float64
    elif convert == "load_state_dict":
        model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    elif convert == "swap_tensors":
        torch.utils.swap_tensors(model.up.weight, nn.Parameter(torch.randn(64, 32)))
    else:
        model.bfloat16()
        dtype = torch.bfloat16
    assert torch.equal(session.mask, mask)
    assert all((state.on == before[name]).all() for name, state in session.params.items())
    call(torch.randn(8, 32, dtype=dtype)).square().mean().backward()
    optimizer.step()
    off = masks(model)["up.weight"][1]
    assert not model.up.weight.grad[~off].any() and model.up.weight.grad[off].any()


@pytest.mark.skipif(release() == "2.11", reason="Dynamo does not recompile for a parameter's new shape")
@pytest.mark.parametrize("way", ["swap_tensors", "data"])
def test_contents_of_another_shape_start_anew(way: str, caplog: pytest.LogCaptureFixture) -> None:
    """A layer that grows while it trains: its old blocks mean nothing to the new weights, and must not be counted."""
    model = Block()
    options = {"warmup_steps": 2, "monitor_every": 2, "block_rows": 16, "inner": "aot_eager"}
    call = torch.compile(model, backend="convaware", options=options)

    def train(steps: int) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        for _ in range(steps):
            optimizer.zero_grad()
            call(torch.randn(8, 32)).square().mean().backward()
            optimizer.step()

    train(4)
    session, old = cacompile.session(model), dict(cacompile.session(model).params)
    wide, back = (64 + 32, 64)
    for width in (wide, back):
        for name, shape in (("up.weight", (width, 32)), ("up.bias", (width,)), ("down.weight", (32, width))):
            param, new = model.get_parameter(name), torch.randn(shape)
            if way == "data":
                param.grad, param.data = None, new
            else:
                torch.utils.swap_tensors(param, nn.Parameter(new))
        caplog.clear()
        train(4)
        assert "its groups start anew" in caplog.text
        state = session.params["up.weight"]
        assert state is not old["up.weight"] and state.blocks == width // 16 and state.step == 4
        session.pin(keep=0.5, seed=0)
        dense = copy.deepcopy(model)
        x = torch.randn(8, 32)
        expected = train_step((dense, dense), [x])
        ours = train_step((model, call), [x])
        torch.testing.assert_close(ours.loss, expected.loss)
        for name, (dim, on) in masks(model).items():
            grad, full = ours.grads[name].movedim(dim, 0), expected.grads[name].movedim(dim, 0)
            torch.testing.assert_close(grad[on], full[on])
            assert not grad[~on].any()
        session.unpin()


def test_swapping_by_a_function_imported_before_starts_anew() -> None:
    model = Block()
    call = torch.compile(model, backend="convaware", options={**OPTIONS, **EAGER["options"]})
    call(torch.randn(8, 32)).square().mean().backward()
    model.zero_grad()
    session = cacompile.session(model)
    session.pin(keep=0.0)
    swap_tensors(model.up.weight, nn.Parameter(torch.randn(64, 32)))
    call(torch.randn(8, 32)).square().mean().backward()
    assert not model.up.weight.grad.any() and not model.down.weight.grad.any(), "the pin is the session's"
    session.unpin()
    model.zero_grad()
    call(torch.randn(8, 32)).square().mean().backward()
    assert model.up.weight.grad.any()
