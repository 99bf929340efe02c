"""The picture of what surrounds one weight gradient: what has to be there is, joined as in the graph, and readable."""

import re
import xml.etree.ElementTree as ET

import pydot
import pytest
import torch
from helpers import Block
from torch import nn

import cacompile
from cacompile.explanation.explain import Explanation

SVG = "{http://www.w3.org/2000/svg}"


class Net(nn.Module):
    """The embedding is tied to the head; the scale makes a second product of one weight's gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(48, 32)
        self.conv = nn.Conv1d(32, 32, 3, padding=1)
        self.block = Block(32)
        self.lonely = nn.Linear(4, 4)

    def forward(self, tokens):
        x = torch.relu(self.conv(self.embed(tokens).mT).mT)
        return nn.functional.linear(self.block(self.block(x)), self.embed.weight)


@pytest.fixture(scope="module")
def found() -> Explanation:
    torch._dynamo.reset()
    return cacompile.explain(Net(), torch.randint(0, 48, (4, 8)), options={"block_rows": 16})


def graph_of(dot: str) -> tuple[dict[str, list[str]], set[tuple[str, str]]]:
    """As a reader of DOT understands it: lines of each label, and arrows."""
    [graph] = pydot.graph_from_dot_data(dot)
    nodes = [node for node in graph.get_nodes() if node.get_name() not in ("graph", "node", "edge")]
    rows = {n.get_name().strip('"'): re.findall(r"<TR><TD[^>]*>(.*?)</TD></TR>", n.get_label()) for n in nodes}
    labels = {name: [re.sub("<.*?>", "", row) for row in lines] for name, lines in rows.items()}
    return labels, {(e.get_source().strip('"'), e.get_destination().strip('"')) for e in graph.get_edges()}


def what(labels: dict[str, list[str]], *words: str) -> list[str]:
    """Keys of what is called so."""
    return [key for key, (first, *_) in labels.items() if first in words]


def test_masked_product_with_its_operands_groups_flags_and_gradient(found):
    labels, arrows = graph_of(found.show("block.up.weight", "dot"))
    products = what(labels, "masked_mm")
    # the block is applied twice
    assert len(products) == 2
    [groups], [flags], [end] = (what(labels, word) for word in ("groups", "flags, 0: skip", "gradient"))
    assert labels[groups][1] == "block.neurons" and "with block.down.weight" in labels[groups]
    assert (groups, flags) in arrows
    [add] = what(labels, "add")
    assert (add, end) in arrows
    for product in products:
        assert (flags, product) in arrows and (product, add) in arrows
        assert any(re.match(r"4 × 16 rows, flags \d+:\d+$", line) for line in labels[product])
        sources = {source for source, user in arrows if user == product}
        assert len(sources) == 3
        assert "saved by the forward" in {labels[source][0] for source in sources}
        [turned] = [source for source in sources if labels[source][0] == "permute"]
        assert any(user == turned for _, user in arrows), "the incoming gradient is missing"
    assert any(first.startswith("incoming gradient, from ") for first, *_ in labels.values())


@pytest.mark.parametrize(
    ("param", "version", "words"),
    [
        ("embed.weight", None, ["masked_mm", "index_put", "embed.tokens"]),
        ("conv.weight", None, ["masked_conv_dw", "conv.filters"]),
        ("conv.weight", "backward", ["convolution_backward"]),
        ("block.up.weight", "joint", ["parameter", "activation, from", "mm"]),
        ("block.up.bias", None, ["dense: one-dimensional, a cheap reduction"]),
    ],
)
def test_pictures(found, param, version, words):
    svg = found.show(param, version=version)
    root = ET.fromstring(svg)
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert texts[0] == f"dW of {param}"
    for word in words:
        assert word in " ".join(texts), word
    # all that was told is drawn
    labels, edges = graph_of(found.show(param, "dot", version=version))
    drawn = [group.get("class", "").split()[0] for group in root.iter(f"{SVG}g") if group.get("class")]
    assert (drawn.count("node"), drawn.count("edge")) == (len(labels), len(edges))
    # in a notebook it is a picture
    assert svg._repr_svg_() == svg == found.show(param, version=version)


def test_files(found, tmp_path):
    for form in ("svg", "dot"):
        text = found.show("conv.weight", form, path=tmp_path / form)
        assert (tmp_path / form).read_text(encoding="utf-8") == text
    assert found.to_svg()._repr_svg_() == found.to_svg()


def test_without_arguments_there_is_something_to_see(found, tmp_path):
    whole = found.show(path=tmp_path / "whole.svg")
    assert whole == found.to_svg() == (tmp_path / "whole.svg").read_text(encoding="utf-8")
    assert found.show(format="dot").startswith("digraph {")
    assert found.code() == found.code("masked") and "masked_mm" in found.code()
    alone = cacompile.explain(nn.Embedding(4, 2), torch.arange(4))
    assert alone.code() == alone.code("joint") and "dense: an embedding" in alone.code()


def test_printed_a_picture_says_what_it_shows(found):
    for picture in (found.show(), found.show("block.up.weight")):
        printed = str(picture)
        assert "<svg" not in printed and printed.startswith(picture.words) and f"{picture}" == printed
        assert picture.text == picture._repr_svg_() == "".join([picture]) and picture.text.startswith("<svg")
    assert "dW of block.up.weight" in str(found.show("block.up.weight"))
    assert "block.neurons" in str(found.show()) and "up.weight, 4 × 16 rows" in str(found.show())
    assert "<svg" in found.to_html()


@pytest.mark.parametrize(
    ("param", "settings", "words"),
    [
        (None, {"version": "masked"}, "of the picture of one parameter"),
        ("block.up.wieght", {}, "unknown parameter 'block.up.wieght'; did you mean 'block.up.weight'?"),
        ("block.up.weight", {"format": "png"}, "unknown format 'png'; known: dot, svg"),
        ("block.up.weight", {"version": "forward"}, "known: backward, joint, masked"),
        ("block.up.weight", {"version": "dense"}, "unknown version 'dense'; "),
        ("block.up.weight", {"graph": 1}, "graph must be an int from 0 to 0, got 1"),
        ("lonely.weight", {}, "cannot be shown: it is in no compiled graph that has run"),
    ],
)
def test_what_there_is_not(found, param, settings, words):
    with pytest.raises(cacompile.ConvAwareError, match=re.escape(words)):
        found.show(param, **settings)


def test_names_are_quoted():
    model = nn.Module()
    model.add_module('a<b>&"c\\', nn.Linear(8, 8))
    model.forward = lambda x: model._modules['a<b>&"c\\'](x)
    found = cacompile.explain(model, torch.randn(2, 8))
    [name] = [row.param for row in found.rows if row.operation]
    assert f"dW of {name}" in "".join(ET.fromstring(found.show(name)).itertext())
    assert pydot.graph_from_dot_data(found.show(name, "dot")) is not None
