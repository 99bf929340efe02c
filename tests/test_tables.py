"""Tables: one set of columns, shown as text, in a terminal and on a page."""

import io

import pytest
from rich.console import Console

from cacompile.pages.html import _environment
from cacompile.pages.tables import Column, Lines, Names, Some, Table

TABLE = Table(
    (
        Column("name", lambda row: Names([row[0]])),
        Column("number", lambda row: str(row[1]), "number"),
        Column("others", lambda row: row[2], wraps=True),
        Column("here", lambda row: "only <here>", "quiet", ("page",)),
    ),
    (("a[0]", 1, Some("bcdefghi")), ("x", 2, Lines("yz"))),
    "Some names",
)


def page(table: Table) -> str:
    return str(_environment().get_template("table.html.jinja").module.show(table))  # type: ignore[attr-defined]


def test_as_text() -> None:
    head, _, first, second = str(TABLE).splitlines()
    assert head.split() == ["name", "number", "others"]
    assert first.split(maxsplit=2) == ["a[0]", "1", "b, c, d, e, f, g and 2 more"]
    assert second.split(maxsplit=2) == ["x", "2", "y, z"]


def test_in_a_terminal() -> None:
    Console(file=(file := io.StringIO()), width=80).print(TABLE)
    assert "Some names" in file.getvalue() and "a[0]" in file.getvalue() and "here" not in file.getvalue()


def test_on_a_page() -> None:
    text = page(TABLE)
    assert '<th class="number">number</th>' in text and '<td class="quiet">only &lt;here&gt;</td>' in text
    assert '<code>g</code><span class="quiet"> and 2 more</span>' in text and "<code>h</code>" not in text
    assert "<code>y</code><br><code>z</code></td>" in text and 'class="narrow"' not in text


@pytest.mark.parametrize("count", [0, 6, 7, 50])
def test_no_name_is_left_out_but_where_some_are_asked_for(count: int) -> None:
    names = [f"n{i}" for i in range(count)]
    assert str(Names(names)) == ", ".join(names)
    assert (" and 1 more" in str(Some(names))) == (count == 7)
