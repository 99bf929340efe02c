"""The segment table: where the blocks of many tensors lie in memory, so that one launch works on all of them.

Seen in the order of its memory, a dense tensor is [outer, rows, inner] around the partitioned dimension, so a block is
`outer` runs of `block * inner` neighbouring elements. Blocks are worked on in chunks of equal size, one program each.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .blocks import KERNEL_DTYPES

CHUNK = 4096
"""Most elements of a chunk."""

FIELDS = 7
"""Numbers that describe a chunk (see `_chunks`)."""

NO_WRAP = 2**30
"""Run length of a chunk that ends before its run does; above every position in a chunk, and divisible by any vector."""

KEPT = 8
"""Most tables that a `Tables` keeps."""

_PLAIN = (Tensor, torch.nn.Parameter)


class StridedPartition(NamedTuple):
    """A tensor's shape and strides, and how it is partitioned: `block` rows at a time along `dim`."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dim: int
    block: int

    @property
    def blocks(self) -> int:
        return -(-self.shape[self.dim] // self.block)


def memory_order(partition: StridedPartition) -> tuple[int, int, int] | None:
    """(outer, rows, inner) of the tensor in the order of its memory; None where it has gaps or overlaps."""
    dims = sorted((d for d, n in enumerate(partition.shape) if n != 1), key=lambda d: -partition.stride[d])
    sizes = [partition.shape[d] for d in dims]
    if 0 in sizes or any(partition.stride[d] != int(np.prod(sizes[i + 1 :])) for i, d in enumerate(dims)):
        return None
    if partition.dim not in dims:  # one row: all of it
        return 1, 1, int(np.prod(sizes))
    at = dims.index(partition.dim)
    return int(np.prod(sizes[:at])), sizes[at], int(np.prod(sizes[at + 1 :]))


@functools.cache
def find_partition(shape: tuple[int, ...], stride: tuple[int, ...], dim: int, block: int) -> StridedPartition | None:
    """The partition of a tensor that a table can hold, one object for equal arguments; else None."""
    order = memory_order(partition := StridedPartition(tuple(shape), stride, dim, block))
    if order is None or (order[0] > 1 and block * order[2] >= NO_WRAP):
        return None
    return partition


def fits(tensors: Iterable[Any], partition: StridedPartition, device: torch.device) -> bool:
    """Whether kernels may read and write them as the table says: plain ones that lie in memory as it does, or None.

    Asked for every tensor in every step, as gradients are new each time and states may have been replaced.
    """
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or tensor.dtype not in KERNEL_DTYPES or tensor.layout is not torch.strided:
            return False
        if tensor.device != device or tensor.shape != partition.shape:
            return False
        if tensor.stride() != partition.stride and not _same_strides(tensor.stride(), partition):
            return False
    return True


def _same_strides(stride: tuple[int, ...], partition: StridedPartition) -> bool:
    """The stride of a dimension of size 1 says nothing, and libraries do not agree on it."""
    return all(a == b or n == 1 for a, b, n in zip(stride, partition.stride, partition.shape, strict=True))


class Batch:
    """What one launch is given: each segment's partition, addresses of its tensors by role, and factors."""

    def __init__(self) -> None:
        self.partitions: list[StridedPartition] = []
        self.pointers: list[list[int]] = []
        self.factors: list[tuple[float, ...]] = []
        self._held: list[Sequence[Tensor | None]] = []
        """What an optimizer computes for us lives as long as its address is used."""

    def add(self, partition: StridedPartition, tensors: Sequence[Tensor | None], factors: tuple[float, ...]) -> None:
        """tensors: None has the address 0, at which nothing is read or written."""
        self.partitions.append(partition)
        self.pointers.append([0 if tensor is None else tensor.data_ptr() for tensor in tensors])
        self.factors.append(factors)
        self._held.append(tensors)


class Sent(NamedTuple):
    """A batch on the device."""

    pointers: Tensor
    """int64 [segments, roles]."""
    factors: Tensor
    """float32 [segments, factors]."""
    weights: Tensor
    """float32 [blocks of all segments]; empty where all are meant."""


class SegmentTable:
    """The chunks of one list of partitions, on the device. Holds for any tensors that lie in memory as they say."""

    def __init__(self, partitions: Sequence[StridedPartition], device: torch.device, chunk: int = CHUNK) -> None:
        self.partitions, self.device, self.chunk = list(partitions), device, chunk
        chunks, first = _chunks(partitions, chunk)
        self.chunks = _send(torch.from_numpy(chunks), device)
        """int64 [chunks, FIELDS]."""
        self.first = _send(torch.from_numpy(first), device)
        """int64 [blocks + 1]: where each block's chunks start."""
        self.blocks = len(first) - 1

    def send(self, batch: Batch, weights: np.ndarray | None = None) -> Sent:
        """The batch on the device, by one copy that nobody waits for. weights: float32 [blocks]."""
        parts: tuple[np.ndarray, ...] = (
            np.array(batch.pointers, np.int64),
            np.array(batch.factors, np.float32),
            np.zeros(0, np.float32) if weights is None else weights.astype(np.float32, copy=False),
        )
        # each part starts at a multiple of 16 bytes, so that kernels are compiled for one alignment only
        starts = np.cumsum([0, *(-(-part.nbytes // 16) * 16 for part in parts)]).tolist()
        # pinned anew each time: torch keeps such memory until the copy from it is done, and then uses it again
        host = torch.empty(starts[-1], dtype=torch.uint8, device="cpu", pin_memory=self.device.type == "cuda")
        view = host.numpy()
        for start, part in zip(starts, parts):
            view[start : start + part.nbytes] = part.reshape(-1).view(np.uint8)
        there = host.to(self.device, non_blocking=True)
        pointers, factors, of_blocks = (
            there[start : start + part.nbytes].view(dtype)
            for start, part, dtype in zip(starts, parts, (torch.int64, torch.float32, torch.float32))
        )
        return Sent(pointers.view(parts[0].shape), factors.view(parts[1].shape), of_blocks)


class Tables:
    """The tables of one owner, each made once for as long as shapes, strides and blocks stay."""

    def __init__(self) -> None:
        self._known: list[SegmentTable] = []

    def find(self, partitions: Sequence[StridedPartition], device: torch.device) -> SegmentTable:
        for table in self._known:
            if table.device == device and table.partitions == partitions:
                return table
        table = SegmentTable(partitions, device)
        self._known = [*self._known[1 - KEPT :], table]
        return table


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _chunks(partitions: Sequence[StridedPartition], chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of all chunks [chunks, FIELDS], and where each block's chunks start [blocks + 1].

    Fields, in elements: base, the distance of the first run's start (or the chunk's own, where it stays within a run)
    from the tensor's; stride, from run to run; first, where in the first run the chunk starts; run, the length of a
    run; length, of the chunk; then the numbers of its segment and of its block.
    """
    blocks = []  # one row a block: offset, stride, run, outer, segment
    for segment, partition in enumerate(partitions):
        order = memory_order(partition)
        assert order is not None
        outside, rows, inner = order
        starts = np.arange(0, rows, min(partition.block, rows), dtype=np.int64)
        runs = np.minimum(partition.block, rows - starts) * inner
        shared = (np.full_like(starts, value) for value in (rows * inner, outside, segment))
        blocks.append(np.stack([starts * inner, runs, *shared], 1))
    offset, run, stride, outer, segment_of = np.concatenate(blocks).T if blocks else np.zeros((5, 0), np.int64)
    counts = -(-run * outer // chunk)
    first = np.concatenate([[0], np.cumsum(counts)])
    of = np.repeat(np.arange(len(counts)), counts)
    start = (np.arange(len(of)) - first[of]) * chunk  # in the elements of its block
    length = np.minimum(chunk, (run * outer)[of] - start)
    whole = start // run[of]
    within = start - whole * run[of]
    base = offset[of] + whole * stride[of]
    wraps = within + length > run[of]
    fields = (
        np.where(wraps, base, base + within),
        np.where(wraps, stride[of], 0),
        np.where(wraps, within, 0),
        np.where(wraps, run[of], NO_WRAP),
        length,
        segment_of[of],
        of,
    )
    return np.ascontiguousarray(np.stack(fields, 1)), first
