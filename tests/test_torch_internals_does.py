"""What functions of `cacompile.torch_internals` find or change, on the real thing."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx

from cacompile import torch_internals as inside

aten = torch.ops.aten


def test_a_compiled_module_and_what_it_wraps() -> None:
    module = torch.nn.Linear(2, 2)
    wrapped = torch.compile(module, backend="eager")
    assert inside.uncompiled(wrapped) is module and inside.uncompiled(module) is module
    assert inside.is_compiled(wrapped) and not inside.is_compiled(module)
    module.compile(backend="eager")
    assert inside.uncompiled(module) is module and inside.is_compiled(module)


def test_code_that_dynamo_holds_is_forgotten() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    assert not inside.is_compiled_code(double.__code__)
    torch.compile(double, backend="eager")(torch.ones(2))
    assert inside.is_compiled_code(double.__code__)
    inside.forget_code(double.__code__)
    assert not inside.is_compiled_code(double.__code__)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("L['self']._modules['up']._parameters['weight']", ["up", "weight"]),
        ("L['self'].layers[3].weight", ["layers", "3", "weight"]),
        ("L['model']._modules['_orig_mod']._buffers['scale']", ["scale"]),
        ("", []),
        (None, []),
    ],
)
def test_where_a_source_is(name: Any, path: list[str]) -> None:
    assert inside.source_path(SimpleNamespace(name=name)) == path
    assert inside.source_path(SimpleNamespace(name=lambda: name)) == path
    assert inside.source_path(None) == []


def two_outputs() -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x")
    first, second = graph.call_function(aten.relu.default, (x,)), graph.call_function(aten.t.default, (x,))
    graph.output((first, second, x)).meta.update(desc=["first", "second", "x"], user_visible_output_idxs=[0, 2])
    return graph


def test_nodes() -> None:
    graph = two_outputs()
    x, first, second, output = graph.nodes
    assert [inside.opname(node) for node in graph.nodes] == ["", "relu", "t", ""]
    inside.rename(first, "dw_up_weight")
    inside.rename(second, "dw_up_weight")
    assert first.name == "dw_up_weight" and second.name.startswith("dw_up_weight_")
    inside.put_in_part_of(first, x)
    assert not first.meta
    x.meta["partitioner_tag"] = "is_backward"
    inside.put_in_part_of(first, x)
    assert first.meta == {"partitioner_tag": "is_backward"}
    inside.erase_output(output, 1)
    assert output.args == ((first, x),)
    assert output.meta == {"desc": ["first", "x"], "user_visible_output_idxs": [0, 1]}


def test_a_copied_graph_is_the_same_code() -> None:
    graph = two_outputs()
    copied = inside.copy_graph(graph)
    assert str(copied) == str(graph) and copied.output_node().meta == graph.output_node().meta
    inside.erase_output(copied.output_node(), 0)
    assert len(graph.output_node().meta["desc"]) == 3


def test_the_kernel_of_an_operation_is_the_operation() -> None:
    a, b = torch.randn(3, 4), torch.randn(4, 2)
    assert torch.equal(inside.kernel_of(aten.mm.default)(a, b), a @ b)


def test_what_dynamo_may_compile_is_known_from_the_frames_above() -> None:
    seen: list[bool] = []

    @torch.compiler.disable
    def hook() -> None:
        seen.append(inside.may_be_compiling(sys._getframe(1)))

    def step(x: torch.Tensor) -> torch.Tensor:
        hook()
        return x + 1

    for call in (step, torch.compile(step, backend="eager"), torch.compiler.disable(step)):
        call(torch.ones(2))
    assert seen == [False, True, True]


def test_a_boxed_callable() -> None:
    def run(args: list[int]) -> int:
        return len(args)

    assert not inside.is_boxed(run)
    assert inside.boxed(run) is run and inside.is_boxed(run)


def test_what_a_compiled_graph_runs_is_wrapped_where_it_lies() -> None:
    def wrap(run: Any) -> Any:
        return lambda args: [*run(args), "wrapped"]

    assert inside.wrap_compiled(lambda args: args, wrap)([1]) == [1, "wrapped"]
    graph = SimpleNamespace(current_callable=lambda args: args)
    assert inside.wrap_compiled(graph, wrap) is graph
    assert graph.current_callable([1]) == [1, "wrapped"]


def test_sizes_that_are_symbolic() -> None:
    seen: list[Any] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        seen.extend(value for value in inputs if isinstance(value, torch.SymInt))
        return gm.forward

    torch.compile(lambda x: x * 2, backend=backend, dynamic=True)(torch.ones(7, 3))
    assert [inside.hint_of(size) for size in seen] == [7, 3]
    assert all(inside.expression_of(size).is_Symbol for size in seen)


def test_tensors() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    y = x.exp()
    assert inside.storage_id(y) == inside.storage_id(y.t()) != inside.storage_id(x)
    assert inside.is_view(y.t()) and not inside.is_view(y)
    before = inside.writes(y)
    with torch.no_grad():
        y.add_(1)
    assert inside.writes(y) == before + 1
    assert not inside.has_hooks(y)
    y.retain_grad()
    assert inside.has_hooks(y)
    z = x.exp()
    z.register_hook(lambda grad: grad)
    assert inside.has_hooks(z)


def test_where_a_module_holds_tensors() -> None:
    module = torch.nn.BatchNorm1d(3)
    module.plain = "text"
    held = [name for store in inside.tensor_stores(module) for name, value in store.items() if torch.is_tensor(value)]
    assert sorted(held) == ["bias", "num_batches_tracked", "running_mean", "running_var", "weight"]


def test_a_profiler_is_seen() -> None:
    assert not inside.is_profiling()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert inside.is_profiling()
    assert not inside.is_profiling()
