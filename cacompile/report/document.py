"""What `explain` found as JSON, after `explain.schema.json` beside this file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import cacompile
from cacompile.errors import ConvAwareError

from .graphs import VERSIONS, Graphs
from .sites import Version

if TYPE_CHECKING:
    from .explain import Explanation

FORMAT = "cacompile.explain"
VERSION = 1
"""Rises whenever a field comes, goes or changes its meaning."""


def schema() -> dict[str, Any]:
    """The JSON Schema of what `text` gives."""
    found: dict[str, Any] = json.loads((files(__package__) / "explain.schema.json").read_text(encoding="utf-8"))
    return found


def text(found: Explanation) -> str:
    """JSON, the same for the same explanation."""
    made_by = {"cacompile": cacompile.__version__, "torch": version("torch")}
    head = {"format": FORMAT, "version": VERSION, "made_by": made_by}
    graphs = [each for each in found.traced if each is not None]
    tail = {
        "versions": [
            {"graph": each.number, "nodes": {name: _nodes(each, name) for name in VERSIONS}} for each in graphs
        ],
        "products": [product for each in graphs for product in _products(found, each)],
    }
    return json.dumps(head | found.to_dict() | tail, indent=2, allow_nan=False) + "\n"


def _nodes(graphs: Graphs, name: str) -> int | None:
    try:
        return len(graphs.version(name).nodes)
    except ConvAwareError:  # there is no such version
        return None


def _products(found: Explanation, graphs: Graphs) -> Iterator[dict[str, Any]]:
    name = "guarded" if graphs.guardable else "joint"
    for site in Version.of(found.context(graphs.number), name).sites.values():
        yield {"graph": graphs.number, "version": name, **asdict(site)}
