"""Which weight gradients are timed: squares, GPT-2 medium, Llama 1B and 8B, ResNet-50; plain data."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

DENSITIES = (1.0, 0.75, 0.5, 0.25, 0.1, 0.0)
"""Shares of the blocks that are on."""


@dataclass(frozen=True)
class Product:
    """dW [m, n] of a linear layer over k tokens, or of `batch` experts: dw = dy^T [m, k] @ x [k, n]."""

    name: str
    m: int
    n: int
    k: int
    masked: tuple[str, ...] = ("rows",)
    """Of "batch", "rows", "columns"."""
    batch: int = 1
    block: int = 128

    @property
    def case(self) -> str:
        size = f"{self.batch} x " * (self.batch > 1) + f"{self.m} x {self.n}, {self.k} tokens"
        return f"{self.name}: {size}, {' and '.join(self.masked)}"

    @property
    def blocks(self) -> tuple[int, int, int]:
        """Block lengths of batch, rows and columns as the operation takes them; 0: not masked."""
        lengths = {"batch": 1, "rows": self.block, "columns": self.block}
        batch, rows, columns = (lengths[axis] * (axis in self.masked) for axis in lengths)
        return batch, rows, columns

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.batch, self.m, self.n

    @property
    def flops(self) -> float:
        return 2.0 * self.batch * self.m * self.n * self.k


@dataclass(frozen=True)
class Conv:
    """dW of a square 2d convolution without groups, over `batch` images of `side` x `side` pixels; filters masked."""

    name: str
    channels: int
    filters: int
    kernel: int
    side: int
    stride: int = 1
    batch: int = 128
    block: int = 64

    @property
    def case(self) -> str:
        shape = f"{self.channels} -> {self.filters}, {self.kernel} x {self.kernel}, stride {self.stride}"
        return f"{self.name}: {shape}, {self.batch} images of {self.side}^2, filters"

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def out_side(self) -> int:
        return (self.side + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def flops(self) -> float:
        taps = self.channels * self.kernel**2
        return 2.0 * self.filters * taps * self.batch * self.out_side**2


Shape = Product | Conv


def masked_axes(shape: Shape) -> dict[int, tuple[int, int]]:
    """Masked dimension of dW -> (block length, number of blocks)."""
    sizes = (shape.filters,) if isinstance(shape, Conv) else shape.sizes
    blocks = (shape.block,) if isinstance(shape, Conv) else shape.blocks
    return {dim: (block, -(-size // block)) for dim, (size, block) in enumerate(zip(sizes, blocks)) if block}


def choices(shape: Shape) -> dict[tuple[int, ...], float]:
    """How many blocks are on along each masked dimension -> the share of dW that leaves; every share once."""
    totals = [count for _, count in masked_axes(shape).values()]
    found = {}
    for density in DENSITIES:
        each = density ** (1 / len(totals))
        counts = tuple(max(round(each * total), 1) if density else 0 for total in totals)
        found[counts] = math.prod(counts) / math.prod(totals)
    return found


def draw_flags(shape: Shape, counts: tuple[int, ...], seed: int) -> tuple[list[int], dict[int, int]]:
    """Flags with so many blocks on along each masked dimension, chosen at random, and where each dimension's start."""
    shuffle = random.Random(seed)
    flags: list[int] = []
    first_flags = {}
    for count, (dim, (_, total)) in zip(counts, masked_axes(shape).items(), strict=True):
        on = set(shuffle.sample(range(total), count))
        first_flags[dim] = len(flags)
        flags += [int(i in on) for i in range(total)]
    return flags, first_flags


def linear(model: str, layer: str, rows: int, columns: int, *masked: str, tokens: int = 8192) -> Product:
    return Product(f"{model} {layer}", rows, columns, tokens, masked or ("rows",))


SHAPES: tuple[Shape, ...] = (
    linear("Llama 1B", "gate, up", 8192, 2048),
    linear("Llama 1B", "down", 2048, 8192, "columns"),
    Product("square", 4096, 4096, 4096),
    Product("square", 8192, 8192, 8192),
    linear("GPT-2 medium", "up", 4096, 1024),
    linear("GPT-2 medium", "down", 1024, 4096, "columns"),
    Conv("ResNet-50 stage 3", 256, 256, 3, 14),
    linear("Llama 8B", "gate, up", 14336, 4096),
    linear("Llama 8B", "down", 4096, 14336, "columns"),
    Conv("ResNet-50 stage 4", 512, 2048, 1, 7),
    Product("square", 2048, 2048, 2048),
    linear("GPT-2 medium", "qkv", 3072, 1024),
    linear("GPT-2 medium", "attention out", 1024, 1024),
    linear("GPT-2 medium", "head", 50304, 1024),
    linear("Llama 1B", "q, attention out", 2048, 2048),
    linear("Llama 1B", "k, v", 512, 2048),
    linear("Llama 1B", "head", 128256, 2048),
    linear("Llama 1B", "down", 2048, 8192),
    Conv("ResNet-50 stage 2", 128, 128, 3, 28),
    Conv("ResNet-50 stage 4", 512, 512, 3, 7),
    Conv("ResNet-50 stage 3", 256, 1024, 1, 14),
    Product("square", 16384, 16384, 16384),
    linear("Llama 8B", "q, attention out", 4096, 4096),
    linear("Llama 8B", "k, v", 1024, 4096),
    linear("Llama 8B", "down", 4096, 14336),
    Product("square", 4096, 4096, 4096, ("columns",)),
    Product("square", 4096, 4096, 4096, ("rows", "columns")),
    Product("experts", 4096, 1024, 2048, ("batch",), batch=8),
    Product("experts", 4096, 1024, 2048, ("batch", "rows"), batch=8),
    Conv("ResNet-50 stage 1", 64, 64, 3, 56),
    Conv("ResNet-50 stage 1", 64, 256, 1, 56),
    Conv("ResNet-50 stage 2", 512, 128, 1, 28),
    Conv("ResNet-50 short cut 3", 512, 1024, 1, 28, stride=2),
    Conv("ResNet-50 stage 3", 1024, 256, 1, 14),
    Conv("ResNet-50 stage 4", 2048, 512, 1, 7),
    Conv("ResNet-50 stem", 3, 64, 7, 224, stride=2),
)
"""The most telling first: what the time does not suffice for is cut from the end."""

TINY: tuple[Shape, ...] = (
    Product("tiny", 64, 32, 40, block=16),
    Product("tiny experts", 32, 16, 24, ("batch", "rows"), batch=3, block=16),
    Conv("tiny", 4, 32, 3, 6, batch=2, block=16),
)
"""For machines without a GPU."""
