"""The masked version is compiled late, from any thread, as if it had been compiled with the dense one."""

from __future__ import annotations

import copy
import threading
import time
from typing import Any

import pytest
import torch
from helpers import Block, assert_masked, compare, compile_all, masks, pin_mixed, train_step
from torch import fx
from torch._inductor.utils import BoxedBool

import cacompile
from cacompile.graph import compiled, masked
from cacompile.graph.backward import BackwardVersions
from cacompile.graph.handle import erase_handle
from cacompile.graph.log import CompileLog
from cacompile.graph.masked import MaskedMaker
from cacompile.graph.source import BackwardSource
from cacompile.graph.version import Version
from cacompile.kernels import masked_mm
from cacompile.passes import group, locate, mark_products, mask_weight_grads
from cacompile.passes.plan import Param, Plan
from cacompile.torch_internals import (
    FakeTensorMode,
    TracingContext,
    aligned_host_inputs,
    inductor_config,
    inductor_graph,
)


class Spied(BackwardVersions):
    """Notes the surroundings in which each version is compiled."""

    made: list[Spied]

    def __init__(self, *args: Any, compile_inner: Any, **kwargs: Any) -> None:
        self.seen: list[dict[str, Any]] = []

        def compile_and_note(gm: fx.GraphModule, inputs: Any, **settings: Any) -> Any:
            time.sleep(0.05)  # long enough for a second thread to come by
            output = gm.graph.output_node()
            with inductor_config.patch(max_fusion_size=7):
                patched = inductor_config.max_fusion_size
            self.seen.append(
                {
                    "fusion": inductor_config.max_fusion_size,
                    "patched": patched,
                    "context": TracingContext.try_get(),
                    "grad": torch.is_grad_enabled(),
                    "outputs": len(output.args[0]),
                    "descs": len(output.meta.get("desc", output.args[0])),
                }
            )
            return compile_inner(gm, inputs, **settings)

        Spied.made.append(self)
        super().__init__(*args, compile_inner=compile_and_note, **kwargs)


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Spied, "made", [], raising=False)
    monkeypatch.setattr(compiled, "BackwardVersions", Spied)


def in_threads(count: int, call: Any) -> list[Any]:
    """What `call` gives in each of so many threads that start together."""
    barrier, found = threading.Barrier(count), []

    def work() -> None:
        barrier.wait()
        found.append(call())

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.skipif(torch.__version__ < "2.12", reason="Inductor's settings are the process's own in torch 2.11")
@pytest.mark.usefixtures("spied")
def test_config_of_the_main_thread_is_seen_from_another() -> None:
    model, x = Block(), [torch.randn(8, 32)]
    replacement = copy.deepcopy(model)
    ours, theirs = (model, compile_all(model, "convaware")), (replacement, compile_all(replacement, "inductor"))
    with inductor_config.patch(max_fusion_size=3):
        train_step(ours, x)
        dense = train_step(theirs, x)
    (made,) = Spied.made
    assert in_threads(1, lambda: inductor_config.max_fusion_size)[0] != 3
    (version,) = in_threads(1, made.masked_version)
    assert version is not None and version.masked == {"up.weight", "down.weight"}
    first, late = made.seen
    assert first["fusion"] == late["fusion"] == 3 and late["patched"] == 7
    assert late["context"] is first["context"] is not None and not late["grad"]
    for seen in made.seen:
        assert seen["outputs"] == seen["descs"]
    pin_mixed(cacompile.session(model))
    assert_masked(train_step(ours, x), dense, masks(model))
    assert len(made.seen) == 2


@pytest.mark.usefixtures("spied")
def test_two_threads_get_one_version_whole() -> None:
    model = Block()
    train_step((model, compile_all(model, "convaware")), [torch.randn(8, 32)])
    (made,) = Spied.made
    one, other = in_threads(2, made.masked_version)
    assert one is other and isinstance(one, Version) and one.masked
    assert len(made.seen) == 2, "dense and masked, each compiled once"


def planned_on(device: str, settings: dict[str, Any]) -> tuple[MaskedMaker, Plan]:
    """What makes the masked version of one product on a device that need not be there, and its plan."""
    graph = fx.Graph()
    dy_t, x = graph.placeholder("dy_t"), graph.placeholder("x")
    dw = graph.call_function(torch.ops.aten.mm.default, (dy_t, x))
    graph.output((dw,))
    with FakeTensorMode():
        for node, shape in {dy_t: (64, 8), x: (8, 32), dw: (64, 32)}.items():
            node.meta["val"] = torch.empty(shape, device=device)
    gm = fx.GraphModule({}, graph)
    plan = group(locate(Plan(params=(Param("w", 0, (64, 32), dw, dw),))), block_rows=16)
    mark_products(plan)
    inputs = [dy_t.meta["val"], x.meta["val"]]
    source = BackwardSource(
        gm, inputs, settings, donated=None, compile_inner=_nothing, compile_log=CompileLog(quiet=True)
    )
    return MaskedMaker(source, plan, torch.device(device)), plan


def _nothing(gm: fx.GraphModule, inputs: Any, **settings: Any) -> Any:
    raise AssertionError("nothing is to be compiled")


@pytest.mark.parametrize(
    "device, settings, wanted",
    (
        ("cuda", {}, False),
        ("cuda", {"cudagraphs": BoxedBool(False)}, True),
        ("cuda", {"cudagraphs": BoxedBool(True)}, False),
        ("cpu", {"cudagraphs": BoxedBool(False)}, False),
    ),
)
def test_the_host_reads_flags_on_a_gpu_without_cuda_graphs(device: str, settings: dict[str, Any], wanted: bool) -> None:
    made, plan = planned_on(device, settings)
    assert made.wants_host == wanted
    mask_weight_grads(made.module, plan, host=made.wants_host)
    fakes = made.fake_flags(plan.blocks)
    assert [fake.device.type for fake in fakes] == [device, "cpu"][: 1 + wanted]
    assert all(fake.shape == (4,) and fake.dtype == torch.uint8 for fake in fakes)
    assert [node.meta["val"] for node in made.module.graph.find_nodes(op="placeholder")[2:]] == fakes


def test_flags_on_the_host_reach_the_masked_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MaskedMaker, "wants_host", True)
    made: list[fx.GraphModule] = []

    def note(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Plan:
        plan = mask_weight_grads(gm, *args, **kwargs)
        made.append(gm)
        return plan

    monkeypatch.setattr(masked, "mask_weight_grads", note)
    compare(Block, lambda: [torch.randn(8, 32)])
    (gm,) = made
    flags, host = gm.graph.find_nodes(op="placeholder")[-2:]
    assert {node.args[2:4] for node in gm.graph.find_nodes(op="call_function", target=masked_mm)} == {(flags, host)}


def test_flags_given_to_a_backward_never_change() -> None:
    model = Block()
    train_step((model, compile_all(model, "convaware")), [torch.randn(8, 32)])
    session = cacompile.session(model)
    (binding,) = session.bindings
    pin_mixed(session)
    assert binding.wants_masked()
    flags, host = binding.leave_out((1,)), binding.host_flags
    before = host.clone()
    assert torch.equal(flags, host) and not host.all() and host.any()
    session.pin(keep=0.0)
    assert binding.wants_masked() and not binding.host_flags.any()
    assert torch.equal(host, before) and torch.equal(flags, before)
    again = binding.host_flags
    session.pin(keep=0.0, seed=1)
    assert binding.wants_masked() and binding.host_flags is again, "the same mask was sent anew"


@pytest.mark.parametrize("wanted", (True, False))
def test_flags_on_the_host_do_not_make_gradients_look_unaligned(wanted: bool) -> None:
    before = inductor_graph.should_assume_input_aligned
    with aligned_host_inputs(wanted):
        assert inductor_graph.should_assume_input_aligned(torch.empty(3)) == wanted
    assert inductor_graph.should_assume_input_aligned is before


def test_output_loses_its_description_with_the_handle() -> None:
    graph = fx.Graph()
    a, handle, b = (graph.placeholder(name) for name in ("a", "handle", "b"))
    graph.output((a, handle, b)).meta.update(desc=["of a", "of handle", "of b"], user_visible_output_idxs=[0, 2])
    gm = fx.GraphModule(torch.nn.Module(), graph)
    assert erase_handle(gm, 1) == 1
    output = gm.graph.output_node()
    assert [n.name for n in output.args[0]] == ["a", "b"]
    assert output.meta["desc"] == ["of a", "of b"] and output.meta["user_visible_output_idxs"] == [0, 1]
