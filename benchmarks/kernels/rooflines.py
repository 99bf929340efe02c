"""What the timed shapes ask for at least, and how live tiles are spread: arithmetic; nothing is compiled or run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from tabulate import tabulate

from benchmarks.gpu.shapes import SHAPES, Conv, Shape, choices, draw_flags, masked_axes
from benchmarks.kernels.resources import Launch, absent, image, operand
from cacompile.kernels import triton_matmul
from cacompile.kernels.masked_conv import convolve_tiles
from cacompile.kernels.triton_tiles import live_tiles, split_k_of


class Roof(NamedTuple):
    """What a datasheet promises: dense bfloat16 FLOPs and bytes of memory traffic in a second."""

    name: str
    flops: float
    bandwidth: float


ROOFS = (Roof("H200", 989e12, 4.8e12), Roof("A100", 312e12, 2.0e12))
PLANNED = "sm_90"
"""Whose tiles, and how they are spread, stand beside the rooflines."""

SHOWN = (1.0, 0.5, 0.25, 0.1)
ITEMSIZE = torch.bfloat16.itemsize


def work(shape: Shape, counts: Sequence[int]) -> tuple[float, float]:
    """(FLOPs, bytes) of a gradient with so many blocks on: live operands read once, all of the result written."""
    on = {dim: n / total for n, (dim, (_, total)) in zip(counts, masked_axes(shape).items(), strict=True)}
    flops = shape.flops * math.prod(on.values())
    if isinstance(shape, Conv):
        pixels = shape.batch * shape.out_side**2
        seen = shape.batch * min(shape.side**2, shape.out_side**2 * shape.kernel**2)  # a stride may leave pixels out
        elements = on[0] * shape.filters * pixels + shape.channels * (seen + shape.filters * shape.kernel**2)
    else:
        batch, rows, columns = (size * on.get(dim, 1.0) for dim, size in enumerate(shape.sizes))
        elements = batch * shape.k * (rows + columns) + math.prod(shape.sizes)
    return flops, ITEMSIZE * elements


def launch_of(shape: Shape, arch: str) -> Launch:
    """The first launch of the library's kernels for a gradient in bfloat16, images channels last."""
    flags = torch.empty(sum(total for _, total in masked_axes(shape).values()), dtype=torch.uint8, device="meta")
    with absent(arch) as launches:
        if isinstance(shape, Conv):
            sizes = (shape.filters, shape.out_side), (shape.channels, shape.side)
            grad_out, x = (image((shape.batch, channels, side, side)) for channels, side in sizes)
            weight = image((shape.filters, shape.channels, shape.kernel, shape.kernel))
            pairs = ([n, n] for n in (shape.stride, shape.padding, 1))
            convolve_tiles(grad_out, x, weight, flags, 0, shape.block, 0, *pairs, False, [0, 0], 1)
        else:
            a, b = (operand(shape.k, n, turned=False, batch=shape.batch) for n in (shape.m, shape.n))
            _, first_flags = draw_flags(shape, tuple(0 for _ in masked_axes(shape)), seed=0)
            triton_matmul.masked_matmul(a.mT, b, flags, [first_flags.get(dim, 0) for dim in range(3)], shape.blocks)
    return launches[0]


class TileSpread(NamedTuple):
    """How live tiles are spread over the programs: some whole, the others split along k."""

    programs: int
    live: int
    split: int
    parts: int

    @property
    def rounds(self) -> int:
        return -(-(self.live - self.split + self.split * self.parts) // self.programs)


def tile_spread(shape: Shape, counts: tuple[int, ...], launch: Launch) -> TileSpread:
    """What the kernel of that launch finds where so many blocks are on."""
    flags, first_flags = draw_flags(shape, counts, seed=0)
    height, width = launch.options["BLOCK_M"], launch.options["BLOCK_N"]
    sizes = (1, shape.filters, 1) if isinstance(shape, Conv) else shape.sizes
    blocks = (0, shape.block, 0) if isinstance(shape, Conv) else shape.blocks
    begins = iter(first_flags.values())
    live = 1
    for size, tile, block in zip(sizes, (1, height, width), blocks):
        begin = next(begins) if block else 0
        own = bytes(flags[begin : begin + -(-size // block)]) if block else b""
        live *= live_tiles(own, tile, block, size) if block else -(-size // tile)
    k = shape.batch * shape.out_side**2 if isinstance(shape, Conv) else shape.k
    if isinstance(shape, Conv):
        taps, one_tap = shape.kernel**2, launch.options.get("ONE_TAP", True)
        live *= taps * -(-shape.channels // width) if one_tap else -(-taps * shape.channels // width)
    programs = launch.grid[0]
    parts = split_k_of(live, programs, -(-k // launch.options["BLOCK_K"]))
    return TileSpread(programs, live, live % programs if parts > 1 else 0, parts)


def roofline_table() -> str:
    """Of every timed shape, without compiling anything."""
    heads = ["dW", "on", "GFLOP", "MB", *(f"{roof.name}: {what}, µs" for roof in ROOFS for what in ("FLOPs", "bytes")),
             "live tiles", "of them split", "parts", "rounds"]  # fmt: skip
    rows: list[list[str]] = []
    for shape in SHAPES:
        launch, name = launch_of(shape, PLANNED), shape.case
        shares = {counts: share for counts, share in choices(shape).items() if share}
        for counts in dict.fromkeys(min(shares, key=lambda c: abs(shares[c] - share)) for share in SHOWN):
            flops, moved = work(shape, counts)
            floors = []
            for roof in ROOFS:
                pair = [1e6 * flops / roof.flops, 1e6 * moved / roof.bandwidth]
                floors += [f"**{t:.1f}**" if t == max(pair) else f"{t:.1f}" for t in pair]
            found = tile_spread(shape, counts, launch)
            tiles = f"{found.live}", f"{found.split}", f"{found.parts}", f"{found.rounds}"
            rows.append([name, f"{shares[counts]:.0%}", f"{flops / 1e9:.1f}", f"{moved / 1e6:.1f}", *floors, *tiles])
            name = ""
    align = ("left", *["right"] * (len(heads) - 1))
    return tabulate(rows, heads, tablefmt="github", disable_numparse=True, colalign=align)
