"""explain as JSON: it is what the published schema says, and says what the explanation says."""

import json
from typing import get_args

import jsonschema
import pytest
import torch
from helpers import Block
from torch import nn

import cacompile
from cacompile.explanation.document import VERSION, schema
from cacompile.explanation.explain import Explanation
from cacompile.explanation.facts import Kind
from cacompile.pages import html
from cacompile.pages.html import render
from cacompile.passes import kinds as products


class Net(nn.Module):
    """Two graphs, one of which has nothing to skip."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.block, self.lonely = nn.LayerNorm(32), Block(), nn.Linear(4, 4)

    def forward(self, x):
        x = self.norm(x)
        torch._dynamo.graph_break()
        return self.block(x)


@pytest.fixture(scope="module")
def found() -> Explanation:
    torch._dynamo.reset()
    return cacompile.explain(Net(), torch.randn(4, 32), options={"block_rows": 16})


@pytest.fixture
def validator() -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(schema())
    return jsonschema.Draft202012Validator(schema())


def test_all_words_for_groups_have_their_place_and_their_colours():
    colours = render("colours.css.jinja")
    assert get_args(Kind) == html.KINDS and {kind.unit_name for kind in products.KINDS} <= set(html.KINDS)
    assert all(colours.count(f".kind-{word} ") == 2 for word in html.KINDS), "light and dark"


def test_a_path_is_checked_and_its_folders_made(found, tmp_path):
    found.to_json(tmp_path / "new" / "found.json")
    assert (tmp_path / "new" / "found.json").is_file()
    for path, words in ((3, "got 3"), ("", "got ''"), (tmp_path, "a file's, got that of a folder")):
        with pytest.raises(cacompile.ConvAwareError, match=words):
            found.code(path=path)


def test_notebooks_show_what_print_does(found):
    class Printer:
        def text(self, text):
            self.said = text

    model = torch.nn.Linear(2, 2)
    for shown in (found, cacompile.status(model)):
        shown._repr_pretty_(printer := Printer(), False)
        assert printer.said == str(shown)


def test_it_is_what_the_schema_says(found, validator, tmp_path):
    text = found.to_json(tmp_path / "found.json")
    assert (tmp_path / "found.json").read_text(encoding="utf-8") == text == found.to_json()
    document = json.loads(text)
    validator.validate(document)
    assert (document["format"], document["version"]) == ("cacompile.explain", VERSION)
    assert {key: document[key] for key in found.to_dict()} == json.loads(json.dumps(found.to_dict()))
    nodes = [one["nodes"] for one in document["versions"]]
    assert [sorted(name for name, count in each.items() if count) for each in nodes] == [
        ["forward", "joint"],
        ["backward", "forward", "joint", "masked"],
    ]
    assert nodes[1]["masked"] == nodes[1]["backward"] + 1  # the flags
    masked = [row for row in document["rows"] if row["operation"]]
    assert [(p["param"], p["operation"], p["flops"]) for p in document["products"]] == [
        (row["param"], row["operation"], row["flops"]) for row in sorted(masked, key=lambda row: row["param"])
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(version=VERSION + 1), "was expected"),
        (lambda d: d.update(extra=1), "Additional properties"),
        (lambda d: d["rows"][0].pop("param"), "'param' is a required property"),
        (lambda d: d["groups"][0].update(kind="heaps"), "is not one of"),
        (lambda d: d["products"][0].update(flags=[1]), "is too short"),
    ],
)
def test_the_schema_refuses_what_is_not_so(found, validator, change, words):
    document = json.loads(found.to_json())
    change(document)
    with pytest.raises(jsonschema.ValidationError, match=words):
        validator.validate(document)


def test_the_committed_schema_is_made_of_the_dataclasses():
    made = pytest.importorskip("cacompile.explanation.schema", reason="needs pydantic").made()
    assert made == schema(), "python -m cacompile.explanation.schema writes it anew"
