"""What `explain` found as tables: of parameters, and of families of groups."""

from __future__ import annotations

from collections.abc import Sequence

from cacompile.pages.tables import Column, Lines, Names, Table

from .facts import Facts
from .families import ExplainedFamily, slice_text

_PARAMETERS = (
    Column("parameter", lambda row: Names([row.param])),
    Column("shape", lambda row: "x".join(map(str, row.shape))),
    Column("gradient from", lambda row: ", ".join(row.nodes) or row.kind, places=("text",)),
    Column("dW FLOPs", lambda row: row.share_text, "number"),
    Column("blocks", lambda row: f"{row.blocks} x {row.block} {row.along}" if row.blocks else ""),
    Column("groups", lambda row: Names(row.families), wraps=True),
    Column("when skipping, or why not", lambda row: row.fate, wraps=True),
)

_FAMILIES = (
    Column("family", lambda family: Names([family.name])),
    Column("kind", lambda family: family.kind),
    Column("groups", lambda family: str(family.count), "number"),
    Column("each of", lambda family: family.units),
    Column("dW FLOPs", lambda family: f"{family.share:.1%}", "number"),
    Column("slices of the first group", lambda family: Lines(map(slice_text, family.groups[0].slices))),
)


def parameters(found: Facts) -> Table:
    """A row for each parameter of each graph."""
    return Table(_PARAMETERS, found.rows, dim=lambda row: not row.operation)


def families(found: Sequence[ExplainedFamily]) -> Table:
    """A row for each family of groups."""
    return Table(_FAMILIES, tuple(found))
