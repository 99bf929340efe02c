"""The picture of the coupling graph: all of it there, once, folded by role, and safe to open."""

import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import replace

import pydot
import pytest
import torch
from helpers import Block
from torch import nn

import cacompile
from cacompile.explanation.drawing import Box, Drawing, Line, dot
from cacompile.explanation.explain import Explanation
from cacompile.explanation.facts import ExplainedGroup, ExplainedParam
from cacompile.explanation.families import families_of
from cacompile.explanation.fold import fold, fold_name, pattern
from cacompile.explanation.picture import picture
from cacompile.passes.plan import SharedAxis, Slice

SVG = "{http://www.w3.org/2000/svg}"


class Net(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.blocks = nn.ModuleList(Block(32) for _ in range(depth))
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 40)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@pytest.fixture(scope="module")
def found() -> Explanation:
    torch._dynamo.reset()
    return cacompile.explain(Net(), torch.randint(0, 40, (4, 8)), options={"block_rows": 16})


def family(
    name: str, *weights: tuple[str, int, tuple[int, ...]], role_hash: str = "", units: int = 16
) -> list[ExplainedGroup]:
    """Two groups of a family; weights: (name, dimension, shape)."""
    kind = name.rpartition(".")[2]
    return [
        ExplainedGroup(
            f"{name}[{start}:{start + units}]",
            name,
            kind,
            role_hash or kind,
            tuple(Slice(weight, dim, start, start + units) for weight, dim, _ in weights),
            100,
            0.05,
        )
        for start in (0, units)
    ]


def row(param: str, *shape: int, reason: str = "") -> ExplainedParam:
    operation = "" if reason else "masked_mm"
    return ExplainedParam(0, param, shape, "linear", (), 100, 0.1, True, 2, 16, "rows", (), operation, reason)


def explanation(
    rows: Sequence[ExplainedParam], groups: Sequence[ExplainedGroup] = (), axes: Sequence[SharedAxis] = ()
) -> Explanation:
    families = tuple(dict.fromkeys(group.family for group in groups))
    return Explanation(tuple(rows), 1, tuple(groups), tuple(axes), families, {}, 10, 0.01)


def layers(count: int, widths: Sequence[int] = ()) -> Explanation:
    """Layers of heads and neurons on one stream, an embedding before and a norm behind them."""
    rows = [row("embed.weight", 99, 8, reason="an embedding: its gradient is a scatter into the rows looked up")]
    groups = []
    for i in range(count):
        width = widths[i] if widths else 32
        qkv, out = (f"layers.{i}.attn.qkv.weight", 0, (32, 8)), (f"layers.{i}.attn.out.weight", 1, (8, 32))
        up, down = (f"layers.{i}.mlp.up.weight", 0, (width, 8)), (f"layers.{i}.mlp.down.weight", 1, (8, width))
        groups += family(f"layers.{i}.attn.heads", qkv, out) + family(f"layers.{i}.mlp.neurons", up, down)
        rows += [row(f"layers.{i}.norm.weight", 8, reason="one-dimensional")]
        rows += [row(name, *shape) for name, _, shape in (qkv, out, up, down)]
    rows.append(row("norm.weight", 8, reason="one-dimensional"))
    members = tuple((r.param, r.shape.index(8)) for r in rows)
    return explanation(rows, groups, [SharedAxis("stream", 8, members)])


def text_of(lines: Sequence[Line]) -> str:
    return " | ".join("".join(word.text for word in line) for line in lines)


def heads(drawing: Drawing) -> list[str]:
    """First lines of the clusters."""
    return [text_of(cluster.lines[:1]) for cluster in drawing.clusters]


def check(found: Explanation) -> tuple[Drawing, ET.Element]:
    """What holds for every picture: each parameter and family is there once, and Graphviz draws what it was told."""
    drawing = picture(found)
    boxes = [*drawing.boxes, *(box for cluster in drawing.clusters for box in cluster.boxes)]
    keys = [box.key for box in boxes]
    params = {row.param for row in found.rows}
    assert len(set(keys)) == len(keys) and {key for key in keys if not key.startswith("groups ")} <= params
    assert {end[0] for edge in drawing.edges for end in (edge.source, edge.target)} <= set(keys)
    root = ET.fromstring(found.to_svg())
    drawn = [group.get("class", "").split()[0] for group in root.iter(f"{SVG}g") if group.get("class")]
    assert drawn.count("node") == len(boxes)
    assert (drawn.count("cluster"), drawn.count("edge")) == (len(drawing.clusters), len(drawing.edges))
    told = pydot.graph_from_dot_data(dot(drawing))[0].get_edges()
    assert sum(edge.get_style() != "invis" for edge in told) == len(drawing.edges)
    return drawing, root


def test_model(found):
    drawing, root = check(found)
    text = "".join(root.itertext())
    assert "blocks.{0..2}.neurons × 3" in text and "Not in any group: 5 parameters" in text
    assert "axes in common, among them stream 32" in re.sub(r"\s+", " ", text_of(drawing.lines).replace(" | ", " "))
    stream = [edge for edge in drawing.edges if edge.classes == "stream stream-0"]
    assert {end for edge in stream for end in (edge.source, edge.target)} >= {
        ("embed.weight", "d1"),
        ("blocks.0.up.weight", "d1"),
        ("blocks.0.down.weight", "d0"),
        ("norm.weight", "d0"),
    }


def test_equal_layers_are_drawn_once():
    drawing, _ = check(layers(3))
    assert heads(drawing) == ["layers.{0..2}.attn.heads × 3", "layers.{0..2}.mlp.neurons × 3"]
    assert [box.key for box in drawing.boxes] == ["embed.weight", "layers.0.norm.weight", "norm.weight"]
    assert "30.0% of dW FLOPs" in text_of(drawing.clusters[0].lines)
    assert len(picture(layers(32)).clusters) == 2


@pytest.mark.parametrize(
    "change", [lambda i: {"role_hash": str(i)}, lambda i: {"kind": ("neurons", "rows")[i % 2]}], ids=["role", "kind"]
)
def test_layers_that_differ_are_drawn_each(change):
    drawing, _ = check(layers(3, widths=[32, 64, 96]))
    assert sum(head.startswith("layers.") and "neurons" in head for head in heads(drawing)) == 3
    alike = layers(3)
    groups = tuple(replace(group, **change(int(group.family.split(".")[1]))) for group in alike.groups)
    assert len(check(replace(alike, groups=groups))[0].clusters) > 2


def test_fold():
    def folded(*names: str) -> list[str]:
        return [fold_name(run) for run in fold(names, pattern)]

    assert folded("a", "l.0.h", "l.0.n", "l.1.h", "l.1.n", "z") == ["a", "l.{0,1}.h", "l.{0,1}.n", "z"]
    assert folded("s.0", "s.2", "s.4", "s.6", "s.8") == ["s.{0,2..8}"]
    assert folded("s.0", "s.1", "s.5") == ["s.{0,1,5}"]
    assert folded("l.0.e.0", "l.0.e.1", "l.1.e.0", "l.1.e.1") == ["l.{0,1}.e.{0,1}"]
    assert folded("a.0", "b.1", "a.2") == ["a.{0,2}", "b.1"]


def labels(boxes: Sequence[Box]) -> list[str]:
    return [text_of(box.lines[:1]) for box in boxes]


def test_weight_of_two_families_is_drawn_in_the_one_that_has_most():
    fused, out = ("block.fused.weight", 0, (80, 8)), ("block.out.weight", 1, (8, 32))
    groups = family("block.neurons", fused, out, units=24) + family("block.heads", fused)
    drawing, root = check(explanation([row(name, *shape) for name, _, shape in (fused, out)], groups))
    assert [labels(cluster.boxes) for cluster in drawing.clusters] == [["fused.weight", "out.weight"]]
    assert labels(drawing.boxes) == ["block.heads"]
    assert "also slices of fused.weight" in "".join(root.itertext())


def test_axis_with_groups_is_a_line_only_where_it_leads_elsewhere():
    first, second = ("a.weight", 0, (32, 8)), ("b.weight", 0, (32, 32))
    axis = SharedAxis("neurons", 32, (("a.weight", 0), ("b.weight", 1)), family=0)
    lonely = SharedAxis("neurons", 32, (("b.weight", 0), ("b.weight", 1)), family=1)
    groups = family("a.neurons", first) + family("b.neurons", second, role_hash="other")
    rows = [row(name, *shape) for name, _, shape in (first, second)]
    drawing, _ = check(explanation(rows, groups, [axis, lonely]))
    assert [(edge.source, edge.target) for edge in drawing.edges] == [(("a.weight", "d0"), ("b.weight", "d1"))]


def test_odd_names_and_shapes():
    name = 'a<b>&"c\\".weight'
    long = ".".join(f"a_rather_long_name_of_a_module_{i}" for i in range(8))
    groups = family(f"{long}.neurons", (name, 0, (32, 8)))
    rows = [row(name, 32, 8), row("scale", reason="<script>alert(1)</script>"), row(f"{long}.bias", 4, reason="vector")]
    found = explanation(rows, groups)
    check(found)
    assert "<script" not in found.to_html() and "<b>" not in found.to_html()
    assert name in "".join(ET.fromstring(found.to_svg()).itertext())


def test_nothing_found():
    assert len(check(explanation([]))[0].clusters) == 0
    assert "0.0% of dW FLOPs" in explanation([]).to_html()


def test_files(found, tmp_path):
    assert found.to_svg(tmp_path / "picture.svg") == (tmp_path / "picture.svg").read_text(encoding="utf-8")
    assert found.to_html(tmp_path / "page.html") == (tmp_path / "page.html").read_text(encoding="utf-8")


def test_page_has_everything_and_needs_nothing(found):
    page = replace(found, untraced={"aten.cumsum.default": 2}).to_html()
    assert not re.search(r"<script|<link|@import|url\(|https?://", re.sub(r'xmlns(:xlink)?="[^"]*"', "", page))
    assert "aten.cumsum.default (2×)" in page
    for name in (*found.families, *(r.param for r in found.rows)):
        assert f"<code>{name}</code>" in page
    assert len(families_of(found)) == len(set(found.families))


def test_equal_input_gives_equal_output(found):
    assert found.to_html() == replace(found).to_html()
    assert layers(4).to_svg() == layers(4).to_svg()


def test_without_graphviz_it_says_what_to_install(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "pygraphviz", None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(cacompile.ConvAwareError, match=r"pip install 'cacompile\[report\]'"):
        found.to_svg()
    assert found.show("head.weight", "dot").startswith("digraph {")


@pytest.mark.parametrize("old", ["cuts", "kin", "guarded", "version"])
def test_old_names_work_and_warn(found, old):
    calls = {
        "cuts": lambda: found.cuts == found.untraced,
        "kin": lambda: found.groups[0].kin == found.groups[0].role_hash,
        "guarded": lambda: found.code("guarded") == found.code("masked"),
        "version": lambda: found.show("head.weight", "dot", version="guarded").startswith("digraph"),
    }
    with pytest.warns(DeprecationWarning, match=old) as warned:
        assert calls[old]()
    assert warned[0].filename == __file__, "who calls it is told"
