"""The graphs as code: what explain shows is what runs, and every skippable line says what is known of it."""

import gc
import inspect
import math
import pickle
import re
import weakref

import pytest
import torch
from helpers import Block
from torch import nn

import cacompile
from cacompile.explanation.chosen import DENSE
from cacompile.explanation.explain import Explanation
from cacompile.explanation.products import Version
from cacompile.graph import masked as versions
from cacompile.passes.kinds import KINDS

OPTIONS = {"block_rows": 16, "inner": "aot_eager"}


class Net(nn.Module):
    """A convolution, an embedding that is tied to the head, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(48, 32)
        self.conv = nn.Conv1d(32, 32, 3, padding=1)
        self.block = Block(32)

    def forward(self, tokens):
        x = self.conv(self.embed(tokens).mT).mT
        return nn.functional.linear(self.block(torch.relu(x)), self.embed.weight)


def tokens() -> torch.Tensor:
    return torch.randint(0, 48, (4, 8))


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def found(net) -> Explanation:
    torch._dynamo.reset()
    return cacompile.explain(net, tokens(), options=OPTIONS)


def inputs(code: str) -> dict[str, str]:
    """Name of an input -> its comment."""
    head = code[: code.index("\n):")]
    return dict(re.findall(r'^    (\w+): "[^"]*",(?:  # (.*))?$', head, re.MULTILINE))


def outputs(code: str) -> list[str]:
    return re.findall(r"^        (\w+),", code[code.index("    return (") :], re.MULTILINE)


def run(code: str, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the printed code computes, by the names of its outputs."""
    names = {"torch": torch, "device": torch.device, "inf": math.inf, "nan": math.nan}
    exec(code, names)
    forward = names["forward"]
    wanted = list(inspect.signature(forward).parameters)[1:]
    return dict(zip(outputs(code), forward(None, *(values[name] for name in wanted))))


def gradients(code: str, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    named = {name: made for made, name in re.findall(r"^        (\w+),  # dW of ([\w.]+)", code, re.MULTILINE)}
    made = run(code, values)
    return {param: made[name] for param, name in named.items()}


def test_the_code_runs_and_skips_what_its_flags_say(net, found):
    x, params = tokens(), dict(net.named_parameters())
    forward = found.code("forward")
    values = {name: params.get(comment, x) for name, comment in inputs(forward).items()}
    with torch.no_grad():
        made = run(forward, values)
        output = made[outputs(forward)[0]]
        torch.testing.assert_close(output, net(x))
        values |= made | {
            name: torch.ones_like(output) for name in inputs(found.code("backward")) if "tangents" in name
        }
        dense = gradients(found.code("backward"), values)
        masked = found.code("masked")
        site = next(iter(Version.of(found.context(0), "masked").products.values()))
        flags = torch.ones(int(re.search(r'convaware_flags: "u8\[(\d+)\]"', masked)[1]), dtype=torch.uint8)
        same = gradients(masked, values | {"convaware_flags": flags})
        flags[site.flags[0] : site.flags[1]] = 0
        skipped = gradients(masked, values | {"convaware_flags": flags})
    net.zero_grad()
    net(x).sum().backward()
    for name, param in params.items():
        torch.testing.assert_close(dense[name], param.grad)
        assert torch.equal(same[name], dense[name]) or name == "conv.bias"
    assert [name for name in params if not torch.equal(skipped[name], same[name])] == [site.param]


def test_every_masked_line_says_what_it_is(found):
    lines = found.code("masked").splitlines()
    masked = [i for i, line in enumerate(lines) if "torch.ops.cacompile.masked_" in line]
    operations = {row.param: row.operation for row in found.rows if row.operation}
    assert len(masked) == len(operations) == 4
    for i in masked:
        first, second = lines[i - 2 : i]
        param = re.match(r"    # dW of (\S+) \[", first)[1]
        row = next(row for row in found.rows if row.param == param)
        assert f": {', '.join(row.families)}, {row.flops:,} FLOPs, {row.share:.1%} of all dW" in first
        start = re.search(r"flags (\d+):(\d+); (some off: .*|all of it or nothing)$", second)
        assert second.startswith(f"    # {row.operation}: {row.blocks} x {row.block} {row.along}, flags ")
        assert int(start[2]) - int(start[1]) == row.blocks
        assert (row.blocks == 1) == ("nothing" in start[3])
        assert row.operation in lines[i]


@pytest.mark.parametrize(
    ("version", "nodes"), [("joint", "backward ----"), ("forward", "saved for dW of"), ("backward", "runs while all")]
)
def test_other_versions_mask_nothing_and_name_their_inputs(found, version, nodes):
    code = found.code(version)
    assert nodes in code
    assert "cacompile.masked_" not in code and "convaware" not in code
    assert (version == "forward") or "# dW of block.up.weight [64x32]: block.neurons, " in code
    if version != "backward":
        assert {"embed.weight", "conv.weight", "conv.bias", "block.up.weight"} <= set(inputs(code).values())
    assert (version == "forward") or "# dW of conv.bias, dense: one-dimensional" in code


def test_diff_is_the_products_and_the_flags_and_nothing_else(found, tmp_path):
    changed = [line for line in found.diff(path=tmp_path / "backward.diff").splitlines()[2:] if line[0] in "+-"]
    dense, masked = ([line[1:].strip() for line in changed if line[0] == sign] for sign in "-+")
    assert (tmp_path / "backward.diff").read_text(encoding="utf-8") == found.diff()
    calls = [line for line in masked if "cacompile.masked_" in line]
    notes = [line for line in masked if line.startswith("# masked_")]
    assert len(calls) == len(notes) == 4
    # the convolution gives up its dW, and its bias gradient becomes a sum
    others = [re.sub(r"(: | = ).*", "", line) for line in masked if line not in (*calls, *notes)]
    assert [name for name in others if not name.startswith("# dW of conv")] == [
        "convaware_flags",
        "convolution_backward",
        "getitem_2",
    ]
    assert {line.split(":")[0] for line in dense if "aten.mm" in line} <= {line.split(":")[0] for line in calls}


def graph_of(graph: torch.fx.Graph) -> list[tuple[object, ...]]:
    """Operations and where their arguments come from, without names."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    return [(node.op, node.target, str(torch.fx.map_arg(node.args, lambda n: place[n]))) for node in graph.nodes]


def test_of_a_compiled_model_it_shows_what_was_compiled_and_compiles_nothing(monkeypatch):
    built = []

    def verify(before, after, masked):
        built.append(graph_of(after))
        return real(before, after, masked)

    real = versions.verify
    monkeypatch.setattr(versions, "verify", verify)
    model = Block()
    compiled = torch.compile(model, backend="convaware", options=OPTIONS)
    x = torch.randn(8, 32)
    compiled(x).sum().backward()
    counters = {name: dict(values) for name, values in torch._dynamo.utils.counters.items()}
    early = cacompile.explain(compiled)
    code = {name: early.code(name) for name in ("joint", "forward", "backward", "masked")}
    assert not built, "looking made the masked version"
    assert {name: dict(values) for name, values in torch._dynamo.utils.counters.items()} == counters
    cacompile.session(model).pin(keep=0.0)
    compiled(x).sum().backward()
    found = cacompile.explain(model)
    assert graph_of(found.traced[0].version("masked")) == built[0]
    assert len(built) == 1
    # an explanation stays what it is while its graphs are compiled on
    assert {name: early.code(name) for name in code} == {name: found.code(name) for name in code} == code
    traced = cacompile.explain(model, x, options=OPTIONS)
    assert traced.code("masked") == code["masked"]
    assert cacompile.session(model).bindings[0].masked_backwards == 1


def test_graphs_that_blocks_share_are_shown_under_each_blocks_names():
    model = nn.Sequential(Block(), Block())
    found = cacompile.explain(model, torch.randn(8, 32), options=OPTIONS)
    assert found.graphs == 1
    for block in model:
        block.compile(backend="convaware", options=OPTIONS)
    model(torch.randn(8, 32)).sum().backward()
    found = cacompile.explain(model)
    assert found.graphs == 2
    for i in range(2):
        code = found.code("masked", graph=i)
        assert f"graph {i} of 2" in code
        assert set(re.findall(r"dW of (\d)\.", code)) == {str(i)}


def test_an_explanation_keeps_no_tensors_alive():
    model = Block()
    found = cacompile.explain(model, torch.randn(8, 32))
    params = [weakref.ref(param) for param in model.parameters()]
    del model
    gc.collect()
    assert [ref() for ref in params] == [None] * 4
    assert "masked_mm" in found.code("masked")


def test_pickling_leaves_the_graphs_behind(found):
    again = pickle.loads(pickle.dumps(found))
    assert again.to_dict() == found.to_dict()
    with pytest.raises(cacompile.ConvAwareError, match="explain the model again"):
        again.code("joint")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (("maskd",), "unknown version 'maskd'; did you mean 'masked'?"),
        (("masked", 1), "graph must be an int from 0 to 0, got 1"),
        (("masked", True), "got True"),
    ],
)
def test_what_there_is_not(found, call, words):
    with pytest.raises(cacompile.ConvAwareError, match=re.escape(words)):
        found.code(*call)


def test_a_graph_without_anything_to_skip_says_why(tmp_path):
    found = cacompile.explain(nn.Sequential(nn.LayerNorm(8), nn.ReLU()), torch.randn(2, 8))
    assert "0.weight" in found.code("joint", path=tmp_path / "joint.py")
    assert (tmp_path / "joint.py").read_text(encoding="utf-8") == found.code("joint")
    with pytest.raises(cacompile.ConvAwareError, match=r"no 'masked' version.*0\.weight: one-dimensional"):
        found.code("masked")


def test_each_kind_of_product_is_one_that_explain_knows() -> None:
    assert {kind.operation for kind in KINDS} == set(DENSE)
