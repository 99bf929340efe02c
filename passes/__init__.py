"""Passes over one compiled graph, in the order they run. Imported as `cacompile.passes`."""

if __name__ != "cacompile.passes":
    raise ImportError("import cacompile.passes; the folder passes/ is the source of that package")

from .alone import find_plan, flags_of, run_passes, with_flags
from .analyse import make_plan
from .couple import couple
from .group import group
from .guard import guard_weight_grads, mark_products
from .locate import locate
from .verify import Broken, verify

__all__ = [
    "Broken",
    "couple",
    "find_plan",
    "flags_of",
    "group",
    "guard_weight_grads",
    "locate",
    "make_plan",
    "mark_products",
    "run_passes",
    "verify",
    "with_flags",
]
