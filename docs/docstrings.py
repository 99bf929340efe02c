"""Docstrings of the house, which are plain text with backticks, as reStructuredText for autodoc."""

import inspect
import re
from collections.abc import Iterable
from typing import Any

_CODE = re.compile(r"`([^`]+)`(?=(\w?))")
_FIELD = re.compile(r"(\w+(?:, \w+)*): (.*)")


def to_rst(lines: Iterable[str], arguments: Iterable[str] = ()) -> list[str]:
    """The same text: code in double backticks, indented lines as a block of code, what arguments are as fields.

    arguments: names; "name: ..." or "name, name: ..." at the beginning of a line says what they are, up to the next
    such line or an empty one.
    """
    known, found = set(arguments), [""]
    code = field = False
    for line in lines:
        if line.startswith("    ") and not field:
            if not code:
                found += ["::", ""]
            code = True
            found.append(line)
            continue
        code = code and not line.strip()
        text = _CODE.sub(lambda each: f"``{each[1]}``" + "\\ " * bool(each[2]), line)
        says = _FIELD.fullmatch(text)
        if says and set(says[1].split(", ")) <= known:
            if not field:
                found.append("")
            names = says[1].split(", ")
            found += [f":param {other}: see {names[-1]}" for other in names[:-1]]
            found.append(f":param {names[-1]}: {says[2]}")
            field = True
        else:
            field = field and bool(line.strip())
            found.append(f"    {text.strip()}" if field else text)
    return [*found[1:], ""]


def convert(app: object, what: str, name: str, of: Any, options: object, lines: list[str]) -> None:
    """For `autodoc-process-docstring`."""
    try:
        arguments = list(inspect.signature(of).parameters)
    except (TypeError, ValueError):  # neither called nor a class
        arguments = []
    lines[:] = to_rst(lines, arguments)
