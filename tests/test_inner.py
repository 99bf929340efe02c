"""Other compilers under us: all on, that compiler alone bit for bit; a mask skips; nothing is compiled again."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import OPTIONS, Block, assert_masked, assert_same, compare, masks, pin_mixed, train_step
from torch import fx, nn
from torch._dynamo import config as dynamo_config
from torch._dynamo import lookup_backend
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.compilers import nop
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.optim import AdamW

import cacompile
from cacompile import ConvAwareError

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from models import GPT, ResNet8


def vendor(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """What a vendor's compiler may look like: takes its arguments one by one, runs the graph as it is."""
    return gm.forward


def boxed(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """One that takes its arguments as a list."""
    return nop(gm, example_inputs)


WHOLE = aot_autograd(
    fw_compiler=vendor,
    bw_compiler=boxed,
    decompositions=select_decomp_table(),
    partition_fn=min_cut_rematerialization_partition,
)
INNERS: dict[str, tuple[Any, Any]] = {  # option -> the backend that it must equal
    "aot_eager": ("aot_eager", "aot_eager"),
    "callable": (vendor, aot_autograd(fw_compiler=vendor)),
    "boxed": (boxed, aot_autograd(fw_compiler=boxed)),
    "whole": (WHOLE, WHOLE),
    "registered": (lookup_backend("aot_eager_default_partitioner"), "aot_eager_default_partitioner"),
}
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]]]] = {
    "block": (Block, lambda: [torch.randn(8, 32)]),
    "resnet": (ResNet8, lambda: [torch.randn(4, 1, 8, 8)]),
    "gpt": (lambda: GPT(17, width=32, depth=1, heads=2, context=8), lambda: [torch.randint(17, (4, 8))]),
}


def compiled(model: nn.Module, inner: Any, **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend="convaware", options={**OPTIONS, "inner": inner, **options})


@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd is returning a function that doesn't take boxed")
@pytest.mark.thin(3)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("which", INNERS)
def test_all_on_is_that_compiler_alone_and_a_mask_skips(which: str, name: str) -> None:
    inner, backend = INNERS[which]

    def compile_it(model: nn.Module, ours: str) -> Callable[..., Any]:
        return compiled(model, inner) if ours == "convaware" else torch.compile(model, backend=backend)

    compare(*MODELS[name], compile_it=compile_it)


class Watching:
    """A vendor's compiler that keeps what it is given."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []
        self.ran: list[int] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        number = len(self.graphs)
        self.graphs.append(gm)
        assert len(example_inputs) == len(gm.graph.find_nodes(op="placeholder"))

        def run(*args: Any) -> Any:
            self.ran.append(number)
            return gm.forward(*args)

        return run


FORWARD, DENSE, MASKED = range(3)


def test_what_a_vendors_compiler_is_given_and_when(tmp_path: Path) -> None:
    watching, model, x = Watching(), Block(), [torch.randn(8, 32)]
    pair = model, compiled(model, watching)
    dense = train_step(pair, x)
    assert watching.ran == [FORWARD, DENSE]
    session = cacompile.session(model)
    torch.save(session.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["about"]["options"]["inner"] == "Watching"
    with dynamo_config.patch(error_on_recompile=True):
        pin_mixed(session)
        assert_masked(train_step(pair, x), dense, masks(model))
        session.unpin()
        assert_same(train_step(pair, x), dense)
        pin_mixed(session)
        train_step(pair, x)
    assert watching.ran == [FORWARD, DENSE, FORWARD, MASKED, FORWARD, DENSE, FORWARD, MASKED]
    assert len(watching.graphs) == 3, "each version is compiled once"

    ours = [{t for node in gm.graph.nodes if (t := str(node.target)).startswith("cacompile")} for gm in watching.graphs]
    assert ours == [set(), set(), {"cacompile.masked_mm.default"}]
    last = watching.graphs[MASKED].graph.find_nodes(op="placeholder")[-1]
    (binding,) = session.bindings
    assert last.meta["val"].dtype == torch.uint8 and last.meta["val"].shape == (binding.layout.blocks,)
    assert not any("handle" in str(node) for gm in watching.graphs for node in gm.graph.nodes)


def test_a_compiler_that_cannot_take_masked_operations_trains_dense(caplog: pytest.LogCaptureFixture) -> None:
    def narrow(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        strange = [node for node in gm.graph.nodes if str(node.target).startswith("cacompile")]
        if strange:
            raise NotImplementedError(strange[0])
        return gm.forward

    model, x = Block(), [torch.randn(8, 32)]
    pair = model, compiled(model, narrow)
    dense = train_step(pair, x)
    cacompile.session(model).pin(keep=0.0)
    with caplog.at_level(logging.WARNING, "cacompile"):
        assert_same(train_step(pair, x), dense)
    assert "could not be compiled, so this graph stays dense" in caplog.text
    assert "stays dense" not in str(cacompile.status(model)) and cacompile.status(model).saved_flops == 0


@dynamo_config.patch(error_on_recompile=False)
def test_training_skips_by_itself(however_fast: None) -> None:
    model, x = Block(), torch.randn(8, 32)
    run = compiled(model, "aot_eager", warmup_steps=4, monitor_every=2, tolerance=0.5)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(16):
        dynamo_config.error_on_recompile = step > 0
        loss = (run(x) - x.sin()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] and 0 < cacompile.status(model).saved_flops < cacompile.status(model).dw_flops


def test_graphs_without_gradients_are_that_compilers_alone() -> None:
    watching, model = Watching(), Block()
    with torch.no_grad():
        compiled(model, watching)(torch.randn(8, 32))
    assert watching.ran == [0] and not cacompile.session(model).bindings


@pytest.mark.parametrize("inner", ["aot_eager", vendor], ids=["aot_eager", "vendor"])
def test_explain_looks_at_that_compilers_graph(inner: Any) -> None:
    found = cacompile.explain(Block(), torch.randn(8, 32), options={**OPTIONS, "inner": inner})
    assert found.coverage == 1.0 and {row.operation for row in found.rows if row.operation} == {"masked_mm"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"options": {"inner": "aot_eagre"}}, ["'inner'", "'aot_eagre'", "did you mean 'aot_eager'?", "a compiler"]),
        ({"options": {"inner": 3}}, ["'inner'", "must be of type str or a compiler", "got 3"]),
        ({"options": {"inner": None}}, ["'inner'", "got None"]),
        (
            {"options": {"inner": "aot_eager", "max_autotune": True}},
            ["'max_autotune' is Inductor's", "'aot_eager'", "tolerance"],
        ),
        ({"options": {"inner": vendor, "nonsense": 1}}, ["'nonsense'", "allowed:", "tolerance"]),
    ],
    ids=["name", "type", "none", "inductor's", "nobody's"],
)
def test_wrong_settings(settings: dict[str, Any], words: list[str]) -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError) as error:
        torch.compile(model, backend="convaware", **settings)(torch.ones(1, 4))
    assert all(word in str(error.value) for word in words), error.value


def test_a_compiler_that_cannot_be_a_key() -> None:
    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, gm: fx.GraphModule, inputs: Any) -> Any: ...

    with pytest.raises(ConvAwareError, match="'inner' must be hashable"):
        cacompile.Config(inner=Unhashable())
    assert {cacompile.Config(inner=vendor), cacompile.Config(inner=vendor)} == {cacompile.Config(inner=vendor)}
