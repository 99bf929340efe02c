"""The kinds of products that make weight gradients: a file and an entry in `KINDS` for each; `verify` judges them."""

from __future__ import annotations

if __name__ != "cacompile.passes.kinds":
    raise ImportError("import cacompile.passes.kinds; the folder passes/ is the source of that package")

from torch import fx

from .base import Extra, Kind
from .batched import Batched
from .convolution import Convolution
from .experts import Experts, is_transposed
from .grouped import Grouped
from .linear import Linear

__all__ = ["KINDS", "Experts", "Extra", "Kind", "is_transposed", "kind_called", "kind_of"]

KINDS: tuple[Kind, ...] = (Linear(), Batched(), Grouped(), Convolution(), Experts())


def kind_of(node: fx.Node) -> Kind | None:
    """The kind of product that a node computes; None if it computes none that makes a dW."""
    return next((kind for kind in KINDS if kind.computes(node)), None)


def kind_called(name: str) -> Kind:
    """A kind of that name; experts of transformers go by that of grouped products."""
    return next(kind for kind in KINDS if kind.name == name)
