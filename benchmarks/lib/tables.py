"""Tables as text, without a library: some benchmarks run where there is little more than torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def text_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns two spaces apart, each as wide as its widest cell."""
    cells = [list(heads), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The same for a page."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
