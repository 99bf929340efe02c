"""Examples of docs/internals.md, docs/freezing.md, and of an own optimizer in docs/pipelines.md run as they stand.

And no two files of tests have one name.
"""

from collections import Counter
from pathlib import Path

import pytest
from pages import Block, blocks, sections

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
