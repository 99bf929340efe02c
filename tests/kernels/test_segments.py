"""The segment table says where blocks lie in memory: every element of a block once, and none of another's."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cacompile.kernels.segments import (
    FIELDS,
    KEPT,
    NO_WRAP,
    Batch,
    SegmentTable,
    Tables,
    find_partition,
    fits,
    memory_order,
)

CPU = torch.device("cpu")
LAST = torch.channels_last

CASES = (  # shape, dim, block, memory format
    ((1,), 0, 1, None),
    ((63,), 0, 5, None),
    ((129, 7), 0, 16, None),
    ((7, 129), 1, 16, None),
    ((1000, 3), 0, 128, None),
    ((3, 1000), 1, 128, None),
    ((16, 64), 1, 16, None),
    ((4, 6, 10), 0, 1, None),
    ((4, 6, 10), 1, 4, None),
    ((6, 5, 3, 2), 0, 4, LAST),
    ((6, 5, 3, 2), 1, 2, LAST),
    ((6, 8, 1, 1), 0, 4, LAST),
    ((1, 8), 0, 3, None),
    ((8, 1), 0, 3, None),
)


def laid_out(shape: tuple[int, ...], memory_format: Any) -> Tensor:
    """Each element says where it lies."""
    tensor = torch.empty(shape)
    if memory_format is not None:
        tensor = tensor.to(memory_format=memory_format)
    size = tensor.numel()
    return torch.arange(size).as_strided(tensor.shape, tensor.stride())


def places(table: SegmentTable, chunk: int) -> tuple[np.ndarray, int, int]:
    """What the kernels make of a chunk: the places of its elements, its segment and its block."""
    base, stride, first, run, length, segment, block = table.chunks[chunk].tolist()
    at = first + np.arange(length)
    assert at.max() < 2**31 and run <= NO_WRAP
    return base + at // run * stride + at % run, segment, block


@pytest.mark.parametrize("chunk", [8, 64, 4096])
def test_chunks_cover_each_block_once(chunk: int):
    tensors = [laid_out(shape, memory_format) for shape, _, _, memory_format in CASES]
    partitions = [
        find_partition(t.shape, t.stride(), dim, block) for t, (_, dim, block, _) in zip(tensors, CASES, strict=True)
    ]
    table = SegmentTable(partitions, CPU, chunk)
    assert table.chunks.shape[1] == FIELDS and (table.chunks[:, 4] <= chunk).all()
    assert table.first.tolist()[0] == 0 and table.first.tolist()[-1] == len(table.chunks)
    number = 0
    for segment, (tensor, (_, dim, block, _)) in enumerate(zip(tensors, CASES, strict=True)):
        for rows in tensor.split(block, dim):
            found = []
            for i in range(int(table.first[number]), int(table.first[number + 1])):
                where, of_segment, of_block = places(table, i)
                assert (of_segment, of_block) == (segment, number)
                found.append(where)
            where = np.concatenate(found)
            assert sorted(where) == sorted(rows.reshape(-1).tolist())
            assert (np.diff(where) > 0).all(), "in the order of memory"
            number += 1
    assert table.blocks == number == sum(partition.blocks for partition in partitions)


def test_a_tensor_beyond_32_bits():
    partition = find_partition((2**20, 2**14), (2**14, 1), 0, 2**19)
    table = SegmentTable([partition], CPU, 2**22)
    ends = [places(table, i)[0][[0, -1]].tolist() for i in (0, len(table.chunks) - 1)]
    assert ends[0][0] == 0 and ends[1][1] == 2**34 - 1
    assert find_partition((2, 2, 2**32), (2**33, 2**32, 1), 1, 1) is None, "a run that is too long to be divided by"


@pytest.mark.parametrize(
    ("shape", "stride", "dim", "expected"),
    [
        ((4, 6), (6, 1), 0, (1, 4, 6)),
        ((4, 6), (1, 4), 0, (6, 4, 1)),
        ((4, 6, 2), (12, 2, 1), 1, (4, 6, 2)),
        ((8, 1), (1, 77), 1, (1, 1, 8)),
        ((), (), 0, None),
        ((4, 6), (7, 1), 0, None),
        ((4, 6), (0, 1), 0, None),
        ((4, 0), (1, 1), 0, None),
    ],
)
def test_memory_order(shape: Any, stride: Any, dim: int, expected: Any):
    if shape == ():
        assert find_partition((1,), (5,), 0, 1) is not None
        return
    partition = find_partition(shape, stride, dim, 2)
    assert (partition and memory_order(partition)) == expected
    assert partition is find_partition(shape, stride, dim, 2)


def test_only_what_lies_as_the_parameter_does_fits():
    weight = torch.empty(6, 8, 1, 1)
    partition = find_partition(weight.shape, weight.stride(), 0, 2)
    other = torch.nn.Parameter(weight.to(memory_format=LAST).clone(memory_format=LAST))
    assert fits((weight, None, other), partition, CPU), "strides of dimensions of size 1 do not count"

    class Mine(Tensor):
        pass

    misfits = (
        weight.double(),
        weight.as_subclass(Mine),
        torch.empty(6, 9, 1, 1),
        torch.empty(8, 6, 1, 1).transpose(0, 1),
        torch.empty(6, 8, 1, 1, device="meta"),
        torch.empty(6, 8, 1, 1).to_sparse(),
        "weight",
    )
    for misfit in misfits:
        assert not fits((weight, misfit), partition, CPU)


def test_a_batch_is_sent_whole():
    partition = find_partition((5, 3), (3, 1), 0, 2)
    table, batch = SegmentTable([partition] * 3, CPU), Batch()
    tensors = [torch.empty(5, 3) for _ in range(3)]
    for i, tensor in enumerate(tensors):
        batch.add(partition, (tensor, None), (i + 0.5, 2.0, -1.0))
    weights = np.array([0.0, 1.0, 1.5] * 3, np.float32)
    sent = table.send(batch, weights)
    assert sent.pointers.tolist() == [[tensor.data_ptr(), 0] for tensor in tensors]
    assert sent.factors.tolist() == [[i + 0.5, 2.0, -1.0] for i in range(3)]
    assert sent.weights.tolist() == weights.tolist()
    assert all((part.data_ptr() - sent.pointers.data_ptr()) % 16 == 0 for part in sent)


def test_tables_stay_while_cuts_stay():
    def partitions(*rows: int) -> list[Any]:
        return [find_partition((n, 4), (4, 1), 0, 2) for n in rows]

    tables = Tables()
    first = tables.find(partitions(4, 6), CPU)
    assert tables.find(partitions(4, 6), CPU) is first
    assert tables.find(partitions(6, 4), CPU) is not first and tables.find(partitions(4), CPU) is not first
    assert tables.find(partitions(4, 6), CPU) is first
    for n in range(KEPT):
        tables.find(partitions(100 + n), CPU)
    assert tables.find(partitions(4, 6), CPU) is not first


def test_no_segments():
    table = SegmentTable([], CPU)
    assert table.blocks == 0 and table.chunks.shape == (0, FIELDS) and table.first.tolist() == [0]
