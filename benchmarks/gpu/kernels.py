"""Times of one masked weight gradient against the library's, at several densities; runs in a worker process."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu.operands import Flags, Operands
from benchmarks.gpu.shapes import Shape, choices
from benchmarks.gpu.timing import FLUSH_BYTES, interleaved

LIBRARY = "library"
DRAWS = 4
"""Masks of one density that take turns, as do the operands."""


def measure(shape: Shape, device: str, seconds: float) -> dict[tuple[str, float], list[float]]:
    """(arm, share of blocks on) -> milliseconds of each round.

    Arms: the library; "tiles", the Triton kernel, which reads the flags on the device; "host", where the host sees the
    flags and chooses the library on what is live, or tiles, from what was measured on this device before.
    """
    if device == "cpu":
        torch.set_num_threads(1)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    first = Operands(shape, dtype, device)
    size = sum(t.nbytes for t in vars(first).values() if isinstance(t, torch.Tensor))
    copies = min(max(2, -(-FLUSH_BYTES // size)), 4) if device == "cuda" else 2
    operands = [first, *(Operands(shape, dtype, device) for _ in range(copies - 1))]
    arms = {(LIBRARY, 1.0): lambda i: operands[i % copies].library()}

    def tiles(flags: list[Flags], i: int) -> torch.Tensor:
        return operands[i % copies].tiles(flags[i % DRAWS])

    def host(flags: list[Flags], i: int) -> torch.Tensor:
        return operands[i % copies].masked(flags[i % DRAWS], host=device == "cuda")

    for counts, share in choices(shape).items():
        flags = [Flags(shape, counts, seed, device) for seed in range(DRAWS)]
        arms["tiles", share] = partial(tiles, flags)
        arms["host", share] = partial(host, flags)
    # every mask once: a first product of a new size has the library look for its algorithm
    return interleaved(arms, device=device, seconds=seconds, warmup=DRAWS if device == "cuda" else 1)
