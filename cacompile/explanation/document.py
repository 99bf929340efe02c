"""What `explain` found as JSON, after `explain.schema.json` beside this file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.resources import files
from typing import Any, Literal

from cacompile.errors import ConvAwareError
from cacompile.passes.plan import SharedAxis

from .facts import DOCUMENTED, ExplainedGroup, ExplainedParam, Facts, StepFlops, Uncounted
from .graphs import VERSIONS, Graphs
from .products import ExplainedProduct, Version

VERSION: Literal[4] = 4
"""Rises whenever a field comes, goes or changes its meaning."""


@dataclass(frozen=True, slots=True)
class MadeBy:
    """Versions of what wrote this."""

    cacompile: str
    torch: str


@dataclass(frozen=True, slots=True)
class VersionSizes:
    """Size of every version of a graph."""

    graph: int
    nodes: dict[str, int | None]
    """Of `joint`, `forward`, `backward` and `masked`; null: there is no such version."""


@dataclass(frozen=True, slots=True)
class DocumentedProduct(ExplainedProduct):
    """A node that computes a weight gradient, or part of one, that can be skipped, and where it is."""

    graph: int
    version: Literal["joint", "masked"]
    """Where the node is; joint where nothing is masked."""


@dataclass(frozen=True, slots=True)
class Document:
    """What `cacompile.explain(model).to_json()` writes; `python -m cacompile.explanation.schema` makes its schema."""

    format: Literal["cacompile.explain"]
    version: Literal[4]
    """Rises whenever a field comes, goes or changes its meaning."""
    made_by: MadeBy
    graphs: int
    """Compiled graphs."""
    nodes: int
    """Nodes of the joint graphs."""
    step: StepFlops
    """FLOPs of one step of the compiled graphs: what savings are a share of."""
    coverage: float
    """Share of the compiled graphs' dW FLOPs that masked operations compute, 0 to 1."""
    semantic: float
    """Share of masked dW FLOPs in groups that mean something, 0 to 1."""
    outside: Uncounted
    """Weights in no compiled graph that has run: coverage knows nothing of them."""
    uncounted: Uncounted
    """Weights made, all or in part, inside operations that nobody can look into: coverage is too high by them."""
    untraced: dict[str, int]
    """Operations through which the meaning of dimensions could not be followed, and how often."""
    rows: tuple[ExplainedParam, ...]
    """What is known of one parameter in one graph."""
    groups: tuple[ExplainedGroup, ...]
    """What is kept or skipped together."""
    axes: tuple[SharedAxis, ...]
    """Axes that dimensions of parameters share."""
    families: tuple[str, ...]
    """Names of the families of groups, graph by graph."""
    versions: tuple[VersionSizes, ...]
    products: tuple[DocumentedProduct, ...]


def schema() -> dict[str, Any]:
    """The JSON Schema of what `text` gives."""
    found: dict[str, Any] = json.loads((files(__package__) / "explain.schema.json").read_text(encoding="utf-8"))
    return found


def text(found: Facts) -> str:
    """JSON, the same for the same explanation."""
    graphs = [each for each in found.traced if each is not None]
    document = Document(
        format="cacompile.explain",
        version=VERSION,
        made_by=MadeBy(version("cacompile"), version("torch")),
        **{name: getattr(found, name) for name in DOCUMENTED},
        versions=tuple(VersionSizes(each.number, {name: _nodes(each, name) for name in VERSIONS}) for each in graphs),
        products=tuple(product for each in graphs for product in _products(found, each)),
    )
    return json.dumps(asdict(document), indent=2, allow_nan=False) + "\n"


def _nodes(graphs: Graphs, name: str) -> int | None:
    try:
        return len(graphs.version(name).nodes)
    except ConvAwareError:  # there is no such version
        return None


def _products(found: Facts, graphs: Graphs) -> Iterator[DocumentedProduct]:
    name: Literal["joint", "masked"] = "masked" if graphs.maskable else "joint"
    for product in Version.of(found.context(graphs.number), name).products.values():
        yield DocumentedProduct(**asdict(product), graph=graphs.number, version=name)
