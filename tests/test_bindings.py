"""Groups, mask and state belong to parameters: modules that share a graph, or a process, never share a mask."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from functorch.compile import aot_function, nop
from helpers import OPTIONS, Block, assert_bits, assert_masked, assert_same, compile_all, masks, mlp, train_step
from torch import nn

import cacompile

pytestmark = pytest.mark.usefixtures("interpreted")


def grads_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def pin_some(module: nn.Module, kept: int) -> None:
    """Only the first `kept` neurons stay on."""
    session = cacompile.session(module)
    session.pin({group: int(group.split("[")[1].split(":")[0]) < kept for group in session.groups})


class Stack(nn.Module):
    """Blocks of one shape, one behind the other."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def compile_blocks(stack: nn.Module, backend: str) -> nn.Module:
    options = {"block_rows": 16, "warmup_steps": 10**6} if backend == "convaware" else None
    for block in stack.blocks:
        block.compile(backend=backend, options=options)
    return stack


@pytest.mark.compiled
def test_blocks_compiled_one_by_one_keep_their_own_mask() -> None:
    stack = Stack()
    replacement = copy.deepcopy(stack)
    x = [torch.randn(8, 32)]
    compile_blocks(stack, "convaware"), compile_blocks(replacement, "inductor")
    dense = train_step((replacement, replacement), x)
    assert_same(train_step((stack, stack), x), dense)
    first, second, third = stack.blocks
    graphs = {id(i.layout) for i in cacompile.session(stack).bindings}
    assert len(graphs) < 3, "identical blocks were expected to share compiled graphs"

    pin_some(first, 16)
    pin_some(second, 0)
    ours = train_step((stack, stack), x)
    found = masks(stack)
    assert_masked(ours, dense, found)
    on = {name: int(rows.sum()) for name, (_, rows) in found.items()}
    assert on == {f"blocks.{i}.{name}.weight": n for i, n in enumerate((16, 0, 64)) for name in ("up", "down")}
    ran = [sum(i.masked_backwards for i in cacompile.session(block).bindings) for block in (first, second, third)]
    assert ran == [1, 1, 0]


def test_identical_blocks_inside_one_graph_have_names_of_their_own() -> None:
    stack = Stack(2)
    call = compile_all(stack, "convaware")
    x = [torch.randn(8, 32)]
    dense = train_step((stack, call), x)
    cacompile.session(stack).pin({"blocks.1.up.weight": False})
    ours = train_step((stack, call), x)
    assert_masked(ours, dense, masks(stack))
    assert not ours.grads["blocks.1.up.weight"].any() and ours.grads["blocks.0.up.weight"].any()
    [binding] = cacompile.session(stack).bindings
    assert [g.param for g in binding.layout.grads] == [
        f"blocks.{i}.{layer}.weight" for i in (0, 1) for layer in ("up", "down")
    ]


@pytest.mark.compiled
def test_two_models_of_one_class_keep_their_own_mask() -> None:
    one, two = Block(), Block()
    x = [torch.randn(8, 32)]
    ours = {m: (m, compile_all(m, "convaware")) for m in (one, two)}
    dense = {m: train_step(ours[m], x) for m in (one, two)}
    cacompile.session(one).pin({"up.weight": False})
    cacompile.session(two).pin({"up.neurons[0:16]": False})
    for model in (one, two):
        assert_masked(train_step(ours[model], x), dense[model], masks(model))
    assert not cacompile.session(one).params["up.weight"].on.any()
    assert cacompile.session(one).params["down.weight"].on.all()
    assert cacompile.session(two).params["up.weight"].on.tolist() == [False, True, True, True]
    cacompile.session(one).unpin()
    assert_same(train_step(ours[one], x), dense[one])
    assert cacompile.session(two).mask.tolist().count(False) == 1


def test_two_models_in_one_backward() -> None:
    one, two = Block(), mlp()
    calls = compile_all(one, "convaware"), compile_all(two, "convaware")
    both = nn.ModuleList([one, two])
    run = both, lambda x: calls[1](calls[0](x))
    x = [torch.randn(8, 32)]
    dense = train_step(run, x)
    cacompile.session(two).pin(keep=0.0)
    ours = train_step(run, x)
    assert_masked(ours, dense, masks(both))
    assert all(ours.grads[f"0.{n}"].any() for n in ("up.weight", "down.weight"))
    assert not any(ours.grads[f"1.{n}"].any() for n in ("0.weight", "3.weight"))


def test_two_forwards_before_two_backwards() -> None:
    one, two = Block(), Block()
    calls = [compile_all(m, "convaware") for m in (one, two)]
    x, y = torch.randn(8, 32), torch.randn(8, 32)
    losses = [call(t).square().sum() for call in calls for t in (x, y)]
    for loss in losses:
        loss.backward()
    dense = [grads_of(one), grads_of(two)]
    one.zero_grad(), two.zero_grad()
    cacompile.session(one).pin({"up.weight": False})
    losses = [call(t).square().sum() for call in calls for t in (x, y)]
    for loss in losses:  # in the same order, for the same sums
        loss.backward()
    assert not one.up.weight.grad.any()
    for name, expected in dense[1].items():
        assert_bits(grads_of(two)[name], expected, name)
    assert_bits(one.down.weight.grad, dense[0]["down.weight"], "down.weight")


def test_deepcopy_has_its_own_mask() -> None:
    model = Block()
    x = [torch.randn(8, 32)]
    compiled = compile_all(model, "convaware")
    dense = train_step((model, compiled), x)
    cacompile.session(model).pin(keep=0.0)
    replacement = copy.deepcopy(compiled)
    assert_same(train_step((replacement._orig_mod, replacement), x), dense)
    assert not train_step((model, compiled), x).grads["up.weight"].any()
    cacompile.session(replacement).pin({"down.weight": False})
    assert_masked(train_step((replacement._orig_mod, replacement), x), dense, masks(replacement._orig_mod))


def test_pickled_model_trains_on() -> None:
    model = Block()
    x = [torch.randn(8, 32)]
    call = compile_all(model, "convaware")
    dense = train_step((model, call), x)
    cacompile.session(model).pin(keep=0.0)
    train_step((model, call), x)
    loaded = pickle.loads(pickle.dumps(model))
    again = compile_all(loaded, "convaware")
    assert_same(train_step((loaded, again), x), dense)
    cacompile.session(loaded).pin({"up.weight": False})
    assert_masked(train_step((loaded, again), x), dense, masks(loaded))


def test_compiling_twice() -> None:
    model = Block()
    x = [torch.randn(8, 32)]
    first, second = compile_all(model, "convaware"), compile_all(model, "convaware", dynamic=False)
    dense = train_step((model, first), x)
    session = cacompile.session(first)
    assert session is cacompile.session(second) is cacompile.session(model)
    session.pin({"up.weight": False})
    for call in (first, second):
        assert_masked(train_step((model, call), x), dense, masks(model))
    torch._dynamo.reset()
    call = compile_all(model, "convaware")
    assert_masked(train_step((model, call), x), dense, masks(model))
    session.unpin()
    assert_same(train_step((model, call), x), dense)


def test_recompiling_with_other_blocks_stays_dense_for_the_second() -> None:
    """Two graphs that cut one parameter differently cannot agree on a mask; the first to run decides."""
    model = Block()
    x = [torch.randn(8, 32)]
    first = compile_all(model, "convaware")
    dense = train_step((model, first), x)
    torch._dynamo.reset()
    other = compile_all(model, "convaware", options={"block_rows": 32})
    cacompile.session(model).pin(keep=0.0)
    assert_same(train_step((model, other), x), dense)


def test_state_goes_with_the_model() -> None:
    """Nothing keeps a model, or its bindings, alive."""
    import gc
    import weakref

    model = Block()
    call = compile_all(model, "convaware")
    train_step((model, call), [torch.randn(8, 32)])
    [binding] = cacompile.session(model).bindings
    gone = weakref.ref(model.up.weight), weakref.ref(binding)
    del model, call, binding
    torch._dynamo.reset()
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


@pytest.mark.parametrize("early", [False, True])
def test_who_asks_for_the_session_first_changes_no_draw(early: bool) -> None:
    """As when only one of several ranks reports: all must skip the same groups."""
    keys = []
    for asks in (False, early):
        torch._dynamo.reset()
        stack = compile_blocks(Stack(), "convaware")
        if asks:
            cacompile.session(stack)
        stack(torch.randn(8, 32))
        keys.append([state.key for state in cacompile.session(stack).params.values() if state.blocks])
    assert keys[0] == keys[1]
    assert len(set(keys[0])) == 6, "identical blocks draw differently"


@pytest.mark.parametrize("stepped", [False, True], ids=["session", "optimizer"])
def test_what_was_trained_before_changes_no_draw(stepped: bool) -> None:
    """Two runs in one process are as those in processes of their own, in which turns start where names say."""
    keys, models = [], []
    for _ in range(2):
        models.append(stack := compile_blocks(Stack(), "convaware"))
        session, optimizer = cacompile.session(stack), torch.optim.AdamW(stack.parameters())
        for _ in range(2):
            stack(torch.randn(8, 32)).sum().backward()
            optimizer.step() if stepped else session.step()
        keys.append([state.key for state in session.params.values() if state.blocks])
    assert keys[0] == keys[1] and len(set(keys[0])) == 6


def test_other_optimizers_change_no_draw() -> None:
    """One that holds nothing of ours may step between the first forwards of identical blocks."""
    stack, other = compile_blocks(Stack(), "convaware"), torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    handle = stack.blocks[0].register_forward_hook(lambda *_: other.step())
    stack(torch.randn(8, 32)).sum().backward()
    handle.remove()
    assert len({state.key for state in cacompile.session(stack).params.values() if state.blocks}) == 6


def test_counts_outlive_the_graphs() -> None:
    model = mlp()
    call, x = compile_all(model, "convaware"), [torch.randn(8, 32)]
    train_step((model, call), x)
    cacompile.session(model).pin(keep=0.0)
    train_step((model, call), x)
    counted = cacompile.session(model).flops
    assert counted[0] == 2 * counted[1] > 0
    torch._dynamo.reset()
    gc.collect()
    assert cacompile.session(model).flops == counted
    train_step((model, call), x)
    assert cacompile.session(model).flops == (counted[0] * 1.5, counted[1] * 2)


def test_status_after_a_recompilation_for_another_size() -> None:
    model = mlp()
    call = compile_all(model, "convaware")
    for batch in (8, 12):
        train_step((model, call), [torch.randn(batch, 32)])
    assert len(cacompile.session(model).bindings) == 2
    cacompile.session(model).pin(keep=0.0)
    assert cacompile.status(model).skipped_dw == pytest.approx(1.0)


def test_a_default_device_does_not_move_the_flags() -> None:
    """They are read on the host in every backward."""
    model = mlp()
    call, x = compile_all(model, "convaware"), [torch.randn(8, 32)]
    with torch.device("meta"):
        train_step((model, call), x)
        cacompile.session(model).pin(keep=0.5)
        train_step((model, call), x)
    assert [i.masked_backwards for i in cacompile.session(model).bindings] == [1]


class SharedAxis(nn.Module):
    """Two ways through weights that they share; each is compiled by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(64, 1) + 0.5)
        self.one, self.two = nn.Parameter(torch.randn(64, 32)), nn.Parameter(torch.randn(64, 32))
        self.fused, self.down, self.wide = nn.Linear(32, 128), nn.Linear(64, 32), nn.Linear(128, 32)

    def normalized(self, weight: nn.Parameter) -> torch.Tensor:
        return weight * (self.gain / weight.norm(dim=1, keepdim=True))

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(nn.functional.linear(x, self.normalized(self.one))))

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.normalized(self.two))

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.fused(x).chunk(2, -1)
        return self.down(nn.functional.silu(gate) * up)

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        return self.wide(torch.relu(self.fused(x)))


@pytest.mark.parametrize("order", [("hidden", "outputs"), ("outputs", "hidden")])
def test_what_one_product_makes_is_masked_together_or_not_at_all(order: tuple[str, str]) -> None:
    """The gain is cut by the first graph; in the second, whose blocks are others, its weight stays dense as well."""
    model, x = SharedAxis(), torch.randn(8, 32)
    calls = {name: torch.compile(getattr(model, name), backend="convaware", options=OPTIONS) for name in order}
    for name in order:
        calls[name](x)
    session = cacompile.session(model)
    session.pin(keep=0.0)
    first, second = ({"hidden": "one", "outputs": "two"}[name] for name in order)
    for name, weight, skipped in zip(order, (first, second), (True, False)):
        model.zero_grad()
        calls[name](x).square().mean().backward()
        for each in (weight, "gain"):
            grad, state = model.get_parameter(each).grad, session.params[each]
            assert bool(grad.any()) != skipped, each
            assert bool(state.skipped.any()) == skipped, each
            state.skipped[:] = False


@pytest.mark.usefixtures("however_fast")
def test_a_graph_that_is_never_trained_keeps_nothing_on() -> None:
    """Its weights have no gradient and no score, and the groups that they were tied to go on being skipped."""
    model, x = SharedAxis(), torch.randn(64, 32)
    options = {**OPTIONS, "warmup_steps": 0, "monitor_every": 1, "tolerance": 1.0}
    gated, whole = (torch.compile(f, backend="convaware", options=options) for f in (model.gated, model.whole))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    kept = []
    for step in range(16):
        if step == 8:
            whole(x)
        gated(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        kept.append(float(cacompile.session(model).mask.float().mean()))
    assert min(kept[:8]) < 1.0 and max(kept[9:]) < 1.0, kept


def test_what_else_is_traced_meanwhile_is_not_ours() -> None:
    """On some releases Inductor traces its patterns, joint graphs as well, while it compiles the first graph."""
    traced = []

    def other(*inputs: torch.Tensor) -> torch.Tensor:
        return torch.stack([x @ x.T for x in inputs if x.dim()]).sum()

    def trace_another(graph: torch.fx.Graph) -> None:
        if not traced:
            traced.append(graph)
            with torch.enable_grad():
                count = torch.tensor(0)  # where the handle is among our graph's inputs
                aot_function(other, nop)(*[torch.randn(4, 4, requires_grad=True) for _ in range(5)], count)

    model = Block()
    with torch._inductor.config.patch(joint_custom_pre_pass=trace_another):
        train_step((model, compile_all(model, "convaware")), [torch.randn(8, 32)])
    assert traced and cacompile.session(model).families == ["up.neurons"]
