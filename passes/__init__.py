"""Passes over one compiled graph, in the order they run. Imported as `cacompile.passes`."""

if __name__ != "cacompile.passes":
    raise ImportError("import cacompile.passes; the folder passes/ is the source of that package")

from cacompile.plan import Param, Plan

from .group import group
from .guard import guard_weight_grads, mark_products
from .locate import locate
from .verify import Broken, verify

__all__ = ["Broken", "group", "guard_weight_grads", "locate", "make_plan", "mark_products", "verify"]


def make_plan(params: tuple[Param, ...], *, block_rows: int, graphs: bool = False) -> Plan:
    """What can be skipped in one joint graph: locate -> group. Changes nothing. graphs: see `locate`."""
    return group(locate(Plan(params=params), graphs=graphs), block_rows=block_rows)
