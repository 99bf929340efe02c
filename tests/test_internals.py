"""Examples of docs/internals.md, docs/freezing.md, and of an own optimizer in docs/pipelines.md run as they stand.

And no two files of tests have one name, what pages say of files is so, and files are short.
"""

import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from pages import Block, blocks, sections

ROOT = Path(__file__).parent.parent

EXAMPLES = [block for block in blocks("internals.md") if block.language == "python"]


def test_each_section_has_an_example() -> None:
    told = ["Four walks through the house", "Words"]
    assert sections("internals.md") == [*dict.fromkeys(block.section for block in EXAMPLES), *told]


OWN = [block for block in blocks("pipelines.md") if block.section == "Your own optimizer"]


FREEZING = [block for block in blocks("freezing.md") if block.language == "python"]


@pytest.mark.parametrize("example", [*EXAMPLES, *OWN, *FREEZING], ids=lambda block: block.section)
def test_example(example: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(example.text, "docs", "exec"), {"__name__": "example"})


def test_no_two_files_of_tests_have_one_name() -> None:
    """In folders without `__init__.py` pytest takes the second for the first, if one process gets both."""
    names = Counter(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_the_map_of_the_house_has_all_layers_in_their_order() -> None:
    """As `lint-imports` checks them, which asks of every file and folder where it is."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
    place = {name: number for number, layer in enumerate(layers) for name in layer.split(" | ")}
    (drawn,) = (block.text for block in blocks("internals.md") if block.section == "Four walks through the house")
    names = [name for line in drawn.splitlines() for name in line[:35].split()]
    assert sorted(names) == sorted(place)
    assert names == sorted(names, key=lambda name: place[name])


def test_files_that_pages_name_are_there() -> None:
    pages = [*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md"), ROOT / "benchmarks" / "README.md"]
    named = {name for page in pages for name in re.findall(r"`([\w/]+/\w+\.py)`", page.read_text(encoding="utf-8"))}
    roots = [ROOT, ROOT / "cacompile", ROOT / "benchmarks"]
    assert len(named) > 20
    assert [name for name in sorted(named) if not any((root / name).exists() for root in roots)] == []


def test_files_are_short_enough_to_hold_one_idea() -> None:
    files = {path.resolve() for folder in ("cacompile", "passes") for path in (ROOT / folder).rglob("*.py")}
    lengths = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert len(files) > 150 and {path: lines for path, lines in lengths.items() if lines > 300} == {}
