"""The examples of docs/internals.md run as they stand."""

import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[1] / "docs" / "internals.md").read_text()
SECTION = re.compile(r"^## (.+)$", re.M)
EXAMPLES = [
    (SECTION.findall(TEXT[: found.start()])[-1], found[1])
    for found in re.finditer(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)
]


def test_each_section_has_an_example() -> None:
    assert SECTION.findall(TEXT) == list(dict.fromkeys(section for section, _ in EXAMPLES))


@pytest.mark.parametrize("code", [code for _, code in EXAMPLES], ids=[section for section, _ in EXAMPLES])
def test_example(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/internals.md", "exec"), {"__name__": "example"})
