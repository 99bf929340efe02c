"""Which way a masked product takes: the operations ask each time they run, and `explain` asks for those who look."""

from __future__ import annotations

import enum


class Way(enum.Enum):
    """How a masked product is computed."""

    WHOLE = "the library's own product"
    NOTHING = "zeros"
    SLICES = "the library's products of what is on"
    TILES = "a Triton kernel, by tiles that are on"
    EVERYTHING = "the library's own product, then zeros where blocks are off"


def decide(live: float | None, *, has_tiles: bool, sliceable: bool, tiles_below: float = 0.0) -> Way:
    """The way of one product, by what is known of it on the host.

    live: share of its entries that are on, 0 to 1; None where the host may not look at the flags.
    has_tiles: a Triton kernel computes it. sliceable: the library can compute what is on alone.
    tiles_below: share from which on slices are faster than tiles, as measured; 0: they always are, above 1: never.
    """
    if live is None:
        return Way.TILES if has_tiles else Way.EVERYTHING
    if live >= 1.0:
        return Way.WHOLE
    if live <= 0.0:
        return Way.NOTHING
    if has_tiles and live < tiles_below:
        return Way.TILES
    return Way.SLICES if sliceable else Way.EVERYTHING
