"""Docstrings become what Sphinx can set."""

import pytest
from docstrings import to_rst


@pytest.mark.parametrize(
    ("lines", "arguments", "expected"),
    [
        (["See `x.y`, or `z`s."], [], ["See ``x.y``, or ``z``\\ s.", ""]),
        (["As in", "", "    a = `1`", "", "    b = 2", "", "That."], [],
         ["As in", "", "::", "", "    a = `1`", "", "    b = 2", "", "That.", ""]),
        (["Does.", "", "path, to: a `file`,", "  or two", "other: none", "", "path: again"], ["path", "to"],
         ["Does.", "", "", ":param path: see to", ":param to: a ``file``,", "    or two", "    other: none", "", "",
          ":param path: again", ""]),
        (["note: this is no argument"], ["path"], ["note: this is no argument", ""]),
    ],
)  # fmt: skip
def test_to_rst(lines: list[str], arguments: list[str], expected: list[str]) -> None:
    assert to_rst(lines, arguments) == expected
