"""Pages of docs: their fenced blocks, in order."""

import re
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
_SECTION = re.compile(r"^## (.+)$", re.M)
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """What stands between two fences."""

    section: str
    language: str
    text: str


def sections(page: str) -> list[str]:
    return _SECTION.findall(_FENCE.sub("", (DOCS / page).read_text(encoding="utf-8")))


def blocks(page: str) -> list[Block]:
    """All blocks of a page of docs that name a language."""
    return blocks_of((DOCS / page).read_text(encoding="utf-8"))


def blocks_of(text: str) -> list[Block]:
    return [
        Block(([""] + _SECTION.findall(text[: found.start()]))[-1], found[1], found[2])
        for found in _FENCE.finditer(text)
    ]
