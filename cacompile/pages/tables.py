"""Tables whose columns are told once: shown as text, in a terminal, and on pages by `table.html.jinja`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from .libraries import library

Place = Literal["text", "terminal", "page"]

EVERYWHERE: tuple[Place, ...] = ("text", "terminal", "page")


class Names(tuple[str, ...]):
    """Names in a cell; on a page they stand as code."""

    __slots__ = ()
    most = sys.maxsize
    """How many are told."""
    broken = False
    """Whether each has a line of its own on a page."""

    @property
    def more(self) -> str:
        return f" and {len(self) - self.most} more" if len(self) > self.most else ""

    def __str__(self) -> str:
        return ", ".join(self[: self.most]) + self.more


class Some(Names):
    """The first of many names."""

    __slots__ = ()
    most = 6


class Lines(Names):
    """Names, or slices, one a line."""

    __slots__ = ()
    broken = True


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table of some kind of rows."""

    head: str
    cell: Callable[[Any], str | Names]
    look: Literal["", "number", "quiet"] = ""
    """How its cells are set: as text, to the right, or pale."""
    places: tuple[Place, ...] = EVERYWHERE
    wraps: bool = False
    """Whether a terminal that is too narrow may break its lines."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows, and what is told of each."""

    columns: tuple[Column, ...]
    rows: tuple[Any, ...]
    title: str = ""
    dim: Callable[[Any], bool] | None = None
    """Rows that a terminal shows pale."""
    narrow: bool = False
    """Whether a page leaves the rest of its width free."""

    def at(self, place: Place) -> list[Column]:
        return [column for column in self.columns if place in column.places]

    def cells(self, place: Place) -> Iterable[list[str]]:
        columns = self.at(place)
        return ([str(column.cell(row)) for column in columns] for row in self.rows)

    def __str__(self) -> str:
        from tabulate import tabulate  # here, so that training needs torch and numpy alone

        heads = [column.head for column in self.at("text")]
        return tabulate(list(self.cells("text")), headers=heads, disable_numparse=True)

    def __rich__(self) -> Any:
        rich = {name: library(f"rich.{name}", "report") for name in ("box", "markup", "table")}
        table = rich["table"].Table(title=self.title, title_justify="left", box=rich["box"].SIMPLE, pad_edge=False)
        for column in self.at("terminal"):
            justify = "right" if column.look == "number" else "left"
            table.add_column(column.head, justify=justify, overflow="fold", no_wrap=not column.wraps)
        for row, cells in zip(self.rows, self.cells("terminal")):
            style = "dim" if self.dim is not None and self.dim(row) else None
            table.add_row(*map(rich["markup"].escape, cells), style=style)
        return table
