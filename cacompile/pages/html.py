"""Templates of pages, filled in."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from .numbers import percent, scientific

if TYPE_CHECKING:
    from jinja2 import Environment

KINDS = ("neurons", "heads", "filters", "experts", "tokens", "outputs", "rows")
"""Kinds of groups; each has its colour."""


def render(template: str, **values: Any) -> str:
    """A template of this package as text; values are escaped. Every value that a template names must be there."""
    return _environment().get_template(template).render(**values)


def kind_class(kind: str) -> str:
    """The class of what has the colour of a kind of groups."""
    return f"kind-{kind}" if kind in KINDS else "kind-none"


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined  # here, so that training does without

    loader = PackageLoader("cacompile.pages")
    jinja = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    jinja.filters.update(kind_class=kind_class, percent=percent, scientific=scientific)
    return jinja
