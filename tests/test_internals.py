"""The examples of docs/internals.md run as they stand."""

from pathlib import Path

import pytest
from pages import Block, blocks, sections

EXAMPLES = [block for block in blocks("internals.md") if block.language == "python"]


def test_each_section_has_an_example() -> None:
    assert sections("internals.md") == list(dict.fromkeys(block.section for block in EXAMPLES))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda block: block.section)
def test_example(example: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(example.text, "docs/internals.md", "exec"), {"__name__": "example"})
