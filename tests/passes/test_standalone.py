"""The passes in plain `torch.compile` and on an exported joint graph, by flags that the user owns."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import Block
from torch import Tensor, fx, nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config as functorch_config
from torch._functorch.aot_autograd import aot_compile_joint_with_descriptors, aot_export_joint_with_descriptors
from torch._functorch.compilers import nop
from torch._inductor.decomposition import select_decomp_table
from torch.nn.utils.parametrizations import weight_norm

from cacompile import ConvAwareError, passes
from cacompile.kernels import masked_mm
from cacompile.passes.marks import MARK, Mark
from cacompile.passes.plan import Plan
from cacompile.passes.standalone import PLAN

BLOCKS = 8


class Flagged(nn.Module):
    """A block and its loss, with flags as a buffer."""

    def __init__(self, flags: Tensor | None = None) -> None:
        super().__init__()
        self.block = Block()
        self.register_buffer("flags", torch.ones(BLOCKS, dtype=torch.uint8) if flags is None else flags, False)

    def forward(self, x: Tensor) -> Tensor:
        return passes.with_flags(self.block(x).square().mean(), self.flags)


@contextlib.contextmanager
def passes_run(**options: Any) -> Iterator[list[Plan]]:
    """All joint graphs that are compiled here get our passes; their plans."""
    plans: list[Plan] = []
    run = functools.partial(passes.run_passes, block_rows=16, on_plan=plans.append, **options)
    with functorch_config.patch(joint_custom_pass=run, enable_autograd_cache=False):
        yield plans


def gradients(model: nn.Module, run: Callable[..., Tensor], *inputs: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    run(*inputs).backward()
    return {name: param.grad.clone() for name, param in model.named_parameters()}


def assert_skipped(grads: dict[str, Tensor], dense: dict[str, Tensor], rows: Tensor, prefix: str) -> None:
    """rows: bool [hidden neurons] of the block, those that are on."""
    up, down = f"{prefix}up.weight", f"{prefix}down.weight"
    assert not grads[up][~rows].any() and not grads[down][:, ~rows].any()
    torch.testing.assert_close(grads[up][rows], dense[up][rows])
    torch.testing.assert_close(grads[down][:, rows], dense[down][:, rows])
    for name in set(grads) - {up, down}:
        assert torch.equal(grads[name], dense[name]), name


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_joint_custom_pass_of_plain_torch_compile(backend: str) -> None:
    model, x = Flagged(), torch.randn(8, 32)
    replacement = copy.deepcopy(model)
    dense = gradients(replacement, torch.compile(replacement, backend=backend), x)
    torch._dynamo.reset()
    with passes_run(params=dict(model.named_parameters())) as plans:
        run = torch.compile(model, backend=backend)
        grads = gradients(model, run, x)
    (plan,) = plans
    assert plan.masked == ("block.up.weight", "block.down.weight") and plan.blocks == BLOCKS
    assert all(torch.equal(grads[name], dense[name]) for name in dense), "all on, yet another gradient"
    with dynamo_config.patch(error_on_recompile=True):
        model.flags.copy_(passes.flags_of(plan, {"block.neurons[0:16]": False, "block.neurons[48:64]": False}))
        on = torch.ones(64, dtype=torch.bool)
        on[:16] = on[48:] = False
        assert_skipped(gradients(model, run, x), dense, on, "block.")
        model.flags.copy_(passes.flags_of(plan))
        grads = gradients(model, run, x)
    assert all(torch.equal(grads[name], dense[name]) for name in dense)
    loss = run(x)
    model.flags.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_without_flags_nodes_are_only_annotated() -> None:
    seen: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, inputs: Any) -> Any:
        seen.append(gm)
        return nop(gm, inputs)

    model, x = Block(), torch.randn(8, 32)
    with passes_run() as plans:
        torch.compile(model, backend=aot_autograd(fw_compiler=keep))(x).sum().backward()
    (plan,) = plans
    assert plan.masked is None and [grad.param.name for grad in plan.grads] == ["up.primals_1", "down.primals_4"]
    forward, backward = ([node.meta.get(MARK) for node in gm.graph.nodes if MARK in node.meta] for gm in seen)
    assert forward == [] and {mark.param for mark in backward} == {"up.primals_1", "down.primals_4"}
    assert all(isinstance(mark, Mark) for mark in backward)
    assert not any(node.target is masked_mm for gm in seen for node in gm.graph.nodes)


def test_an_activation_that_wants_a_gradient_is_no_parameter() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(32, 16))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    with passes_run() as plans:
        torch.compile(Product(), backend="aot_eager")(torch.randn(32, 32, requires_grad=True)).sum().backward()
    assert [param.shape for param in plans[0].params] == [(32, 16)]


def exported(model: nn.Module, x: Tensor, stack: contextlib.ExitStack) -> Any:
    return aot_export_joint_with_descriptors(stack, model, (x,))


@pytest.mark.parametrize("given", ["by operation", "by node"])
def test_an_exported_joint_graph(given: str) -> None:
    model, x = Flagged(), torch.randn(8, 32)
    dense = gradients(model, model, x)
    with contextlib.ExitStack() as stack:
        joint = exported(model, x, stack)
        gm = joint.graph_module
        flags = next(node for node in gm.graph.find_nodes(op="placeholder") if node.meta["val"].dtype == torch.uint8)
        if given == "by node":
            (carrier,) = [node for node in gm.graph.nodes if "with_flags" in str(node.target)]
            carrier.target, carrier.args = torch.ops.aten.clone.default, carrier.args[:1]
        assert passes.run_passes(gm, block_rows=16, flags=flags if given == "by node" else None) is gm
        run = aot_compile_joint_with_descriptors(joint)
    plan = gm.meta[PLAN]
    assert plan.masked == ("block.up.weight", "block.down.weight")
    inputs = [*model.parameters(), *model.buffers(), x]
    grads = gradients(model, run, *inputs)
    assert all(torch.equal(grads[name], dense[name]) for name in dense)
    mask = [True, False, True, True]
    model.flags.copy_(passes.flags_of(plan, mask))
    assert_skipped(gradients(model, run, *inputs), dense, torch.tensor(mask).repeat_interleave(16), "block.")


def test_a_weight_that_is_made_of_two_parameters() -> None:
    class Normed(Flagged):
        def __init__(self) -> None:
            super().__init__()
            self.block.up = weight_norm(self.block.up)

    model, x = Normed(), torch.randn(8, 32)
    with contextlib.ExitStack() as stack:
        joint = aot_export_joint_with_descriptors(stack, model, (x,), decompositions=select_decomp_table())
        with pytest.raises(ConvAwareError, match=r"flags must be uint8 \[12 or more\]"):
            passes.run_passes(joint.graph_module, block_rows=16)
    model.flags = torch.ones(12, dtype=torch.uint8)
    dense = gradients(model, model, x)
    with contextlib.ExitStack() as stack:
        joint = aot_export_joint_with_descriptors(stack, model, (x,), decompositions=select_decomp_table())
        plan = passes.run_passes(joint.graph_module, block_rows=16).meta[PLAN]
        run = aot_compile_joint_with_descriptors(joint)
    gain, direction = (f"block.up.parametrizations.weight.original{i}" for i in (0, 1))
    assert set(plan.masked) == {gain, direction, "block.down.weight"}
    model.flags.copy_(passes.flags_of(plan, [False, True, True, True]))
    grads = gradients(model, run, *model.parameters(), *model.buffers(), x)
    for name in (gain, direction):
        assert not grads[name][:16].any()
        torch.testing.assert_close(grads[name][16:], dense[name][16:])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (torch.ones(7, dtype=torch.uint8), r"uint8 \[8 or more\] on cpu, got uint8 \[7\]"),
        (torch.ones(8, dtype=torch.bool), r"got bool \[8\] on cpu"),
        (torch.ones(2, 4, dtype=torch.uint8), r"got uint8 \[2, 4\]"),
    ],
    ids=["short", "bool", "matrix"],
)
def test_flags_that_do_not_fit(flags: Tensor, words: str) -> None:
    with contextlib.ExitStack() as stack:
        joint = exported(Flagged(flags), torch.randn(8, 32), stack)
        with pytest.raises(ConvAwareError, match=words):
            passes.run_passes(joint.graph_module, block_rows=16)


def test_a_graph_that_does_not_say_what_its_outputs_are() -> None:
    graph = fx.Graph()
    graph.output((graph.placeholder("x"),))
    with pytest.raises(ConvAwareError, match="aot_export_joint_with_descriptors"):
        passes.find_plan(fx.GraphModule({}, graph))


def test_flags_by_name_and_by_number() -> None:
    with contextlib.ExitStack() as stack:
        plan = passes.find_plan(exported(Flagged(), torch.randn(8, 32), stack).graph_module, block_rows=16)
    assert passes.flags_of(plan).tolist() == [1] * 8 and plan.masked is None
    one = passes.flags_of(plan, {"block.neurons[16:32]": False})
    assert one.tolist() == passes.flags_of(plan, [True, False, True, True]).tolist() == [1, 0, 1, 1] * 2
    assert passes.flags_of(plan, {"block.neurons": False, "block.neurons[0:16]": True}).tolist() == [1, 0, 0, 0] * 2
    with pytest.raises(ConvAwareError, match=r"'block.neuron'; did you mean 'block.neurons'"):
        passes.flags_of(plan, {"block.neuron": False})
    with pytest.raises(ConvAwareError, match="each of the 4 groups, got 3"):
        passes.flags_of(plan, [True] * 3)


def test_without_the_passes_flags_change_nothing() -> None:
    model, x = Flagged(torch.zeros(8, dtype=torch.uint8)), torch.randn(8, 32)
    assert torch.equal(model(x), model.block(x).square().mean())
    torch.library.opcheck(torch.ops.cacompile.with_flags.default, (x.requires_grad_(), model.flags))
