"""Passes over one compiled graph, in the order they run. Imported as `cacompile.passes`."""

if __name__ != "cacompile.passes":
    raise ImportError("import cacompile.passes; the folder passes/ is the source of that package")

from typing import Any

from cacompile.errors import renamed

from .analyse import make_plan
from .coupling import couple
from .described import describe
from .group import group
from .locate import locate
from .mask import mark_products, mask_weight_grads
from .standalone import find_plan, flags_of, run_passes, with_flags
from .truncate import truncate
from .verify import Broken, verify, verify_truncated


def __getattr__(name: str) -> Any:
    if name != "guard_weight_grads":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    renamed("passes.guard_weight_grads", "passes.mask_weight_grads")
    return mask_weight_grads


__all__ = [
    "Broken",
    "couple",
    "describe",
    "find_plan",
    "flags_of",
    "group",
    "locate",
    "make_plan",
    "mark_products",
    "mask_weight_grads",
    "run_passes",
    "truncate",
    "verify",
    "verify_truncated",
    "with_flags",
]
