"""The picture of the coupling graph: all of it there, once, nothing on top of anything else, and safe to open."""

import itertools
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from helpers import Block
from torch import nn

import cacompile
from cacompile.plan import Shared, Slice
from cacompile.report.explain import Explanation, Row
from cacompile.report.fold import fold, fold_name, gather
from cacompile.report.groups import Group
from cacompile.report.picture import UNGROUPED, Picture, families_of, picture_of

SVG = "{http://www.w3.org/2000/svg}"
Rect = tuple[float, float, float, float]


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


def family(name: str, *weights: tuple[str, int, tuple[int, ...]], kin: str = "", units: int = 16) -> list[Group]:
    """Two groups of a family; weights: (name, dimension, shape)."""
    kind = name.rpartition(".")[2]
    return [
        Group(
            f"{name}[{start}:{start + units}]",
            name,
            kind,
            kin or kind,
            tuple(Slice(weight, dim, start, start + units) for weight, dim, _ in weights),
            100,
            0.05,
        )
        for start in (0, units)
    ]


def row(param: str, *shape: int, reason: str = "") -> Row:
    operation = "" if reason else "masked_mm"
    return Row(0, param, shape, "linear", (), 100, 0.1, 2, 16, "rows", (), operation, reason)


def explanation(rows: Sequence[Row], groups: Sequence[Group] = (), axes: Sequence[Shared] = ()) -> Explanation:
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
    return explanation(rows, groups, [Shared("stream", 8, members)])


def rects(root: ET.Element, name: str) -> list[Rect]:
    return [
        tuple(float(rect.get(key, "")) for key in ("x", "y", "width", "height"))
        for rect in root.iter(f"{SVG}rect")
        if name in rect.get("class", "").split()
    ]


def overlap(a: Rect, b: Rect) -> bool:
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]


def inside(a: Rect, b: Rect) -> bool:
    return b[0] <= a[0] and a[0] + a[2] <= b[0] + b[2] and b[1] <= a[1] and a[1] + a[3] <= b[1] + b[3]


def text_rects(root: ET.Element) -> list[Rect]:
    """As wide as they are told to be, as high as capitals and descenders."""
    out = []
    for text in root.iter(f"{SVG}text"):
        x, y, width = float(text.get("x", "")), float(text.get("y", "")), float(text.get("textLength", 0))
        out.append((x - 8, y - width, 8, width) if text.get("transform") else (x, y - 8, width, 10))
    return out


def check(found: Explanation) -> tuple[Picture, ET.Element]:
    """What holds for every picture."""
    picture = picture_of(found)
    root = ET.fromstring(found.to_svg())
    drawn = [name for cluster in picture.clusters for box in cluster.boxes for name in box.names]
    assert sorted(drawn) == sorted({r.param for r in found.rows})
    families = [name for cluster in picture.clusters for name in cluster.names]
    assert sorted(families) == sorted({group.family for group in found.groups})
    boxes, clusters = rects(root, "box"), rects(root, "front")
    assert len(boxes) == sum(len(cluster.boxes) for cluster in picture.clusters)
    assert len(clusters) == len(picture.clusters)
    for several in (boxes, clusters, text_rects(root)):
        assert not [pair for pair in itertools.combinations(several, 2) if overlap(*pair)]
    page = (0.0, 0.0, float(root.get("width", "")), float(root.get("height", "")))
    assert all(inside(it, page) for it in (*boxes, *clusters, *text_rects(root)))
    assert all(sum(inside(box, cluster) for cluster in clusters) == 1 for box in boxes)
    for text in text_rects(root):
        assert all(inside(text, it) or not overlap(text, it) for it in (*boxes, *clusters)), "a text crosses an edge"
    return picture, root


def test_model(found):
    picture, root = check(found)
    text = "".join(root.itertext())
    assert "blocks.{0..2}.neurons" in text and "× 3" in text
    assert "not in any group" in text and "norm.weight" in text
    [stream] = [line for line in picture.lines if line.kind == "stream"]
    assert stream.label == "stream 32"
    assert {port.box.label for port in stream.ports} >= {"weight", "up.weight", "down.weight", "norm.weight"}


def test_equal_layers_are_drawn_once():
    picture, _ = check(layers(3))
    assert [cluster.title for cluster in picture.clusters] == [
        "layers.{0..2}.attn.heads",
        "layers.{0..2}.mlp.neurons",
        UNGROUPED,
    ]
    assert [box.label for box in picture.clusters[-1].boxes] == [
        "embed.weight",
        "layers.{0..2}.norm.weight",
        "norm.weight",
    ]
    assert picture.clusters[0].share == pytest.approx(0.3)
    assert len(picture_of(layers(32)).clusters) == 3


def test_layers_that_differ_are_drawn_each():
    picture, _ = check(layers(3, widths=[32, 64, 96]))
    assert sum(cluster.kind == "neurons" for cluster in picture.clusters) == 3
    other_kin = layers(3)
    other_kin = replace(other_kin, groups=tuple(replace(group, kin=group.name) for group in other_kin.groups))
    assert len(check(other_kin)[0].clusters) == 7


def test_fold():
    def folded(*names: str) -> list[str]:
        return [fold_name(run) for run in fold(names, str, lambda name: "")]

    assert folded("a", "l.0.h", "l.0.n", "l.1.h", "l.1.n", "z") == ["a", "l.{0,1}.h", "l.{0,1}.n", "z"]
    assert folded("l.0.n", "l.1.h", "l.1.n", "l.2.h", "l.2.n") == ["l.0.n", "l.{1,2}.h", "l.{1,2}.n"]
    assert folded("s.0", "s.2", "s.4", "s.6", "s.8") == ["s.{0,2..8}"]
    assert folded("s.0", "s.1", "s.5") == ["s.{0,1,5}"]
    assert folded("l.0.e.0", "l.0.e.1", "l.1.e.0", "l.1.e.1") == ["l.{0,1}.e.{0,1}"]
    assert folded("a.0", "b.1", "a.2") == ["a.0", "b.1", "a.2"]
    names = ["l.0.norm", "l.0.bias", "l.1.norm", "l.3.bias", "norm"]
    assert [fold_name(run) for run in gather(names, str, lambda name: "")] == ["l.{0,1}.norm", "l.{0,3}.bias", "norm"]


def test_weight_of_two_families_is_drawn_in_the_one_that_has_most():
    fused, out = ("block.fused.weight", 0, (80, 8)), ("block.out.weight", 1, (8, 32))
    groups = family("block.neurons", fused, out, units=24) + family("block.heads", fused)
    picture, root = check(explanation([row(name, *shape) for name, _, shape in (fused, out)], groups))
    assert [[box.label for box in cluster.boxes] for cluster in picture.clusters] == [
        ["fused.weight", "out.weight"],
        [],
    ]
    assert "also slices of fused.weight" in "".join(root.itertext())


def test_axis_with_groups_is_a_line_only_where_it_leads_elsewhere():
    first, second = ("a.weight", 0, (32, 8)), ("b.weight", 0, (32, 32))
    axis = Shared("neurons", 32, (("a.weight", 0), ("b.weight", 1)), family=0)
    alone = Shared("neurons", 32, (("b.weight", 0),), family=1)
    groups = family("a.neurons", first) + family("b.neurons", second, kin="other")
    rows = [row(name, *shape) for name, _, shape in (first, second)]
    picture, _ = check(explanation(rows, groups, [axis, alone]))
    [line] = picture.lines
    assert [(port.box.names[0], port.dim) for port in line.ports] == [("a.weight", 0), ("b.weight", 1)]


def test_odd_names_and_shapes():
    name = 'a<b>&"c".weight'
    long = ".".join(f"a_rather_long_name_of_a_module_{i}" for i in range(8))
    groups = family(f"{long}.neurons", (name, 0, (32, 8)))
    rows = [row(name, 32, 8), row("scale", reason="<script>alert(1)</script>"), row(f"{long}.bias", 4, reason="vector")]
    found = explanation(rows, groups)
    check(found)
    assert "<script" not in found.to_html() and "<b>" not in found.to_html()
    assert name in "".join(ET.fromstring(found.to_svg()).itertext())


def test_nothing_found():
    check(explanation([]))
    assert "0.0% of dW FLOPs" in explanation([]).to_html()


def test_files(found, tmp_path):
    assert found.to_svg(tmp_path / "picture.svg") == (tmp_path / "picture.svg").read_text(encoding="utf-8")
    assert found.to_html(tmp_path / "page.html") == (tmp_path / "page.html").read_text(encoding="utf-8")


def test_page_has_everything_and_needs_nothing(found):
    page = replace(found, cuts={"aten.cumsum.default": 2}).to_html()
    assert not re.search(
        r"https?://|<script|<link|@import|url\(", page.replace('xmlns="http://www.w3.org/2000/svg"', "")
    )
    assert "aten.cumsum.default (2×)" in page
    for name in (*found.families, *(r.param for r in found.rows)):
        assert f"<code>{name}</code>" in page
    assert len(families_of(found)) == len(set(found.families))


def test_equal_input_gives_equal_output(found):
    assert found.to_html() == replace(found).to_html()
    assert layers(4).to_svg() == layers(4).to_svg()
