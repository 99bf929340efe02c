"""What the dimensions of parameters have to do with each other, followed through the forward part of a joint graph."""

from __future__ import annotations

if __name__ != "cacompile.passes.coupling":
    raise ImportError("import cacompile.passes.coupling; the folder passes/ is the source of that package")

from .components import THINNEST, Components, Owner, Part, stretch
from .couple import couple
from .walk import Coupling

__all__ = ["THINNEST", "Components", "Coupling", "Owner", "Part", "couple", "stretch"]
