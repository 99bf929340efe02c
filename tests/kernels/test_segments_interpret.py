"""Sums over and values for blocks of many tensors in one launch: by Triton's interpreter, and on a GPU if there is."""

from typing import Any

import numpy as np
import pytest
import torch
from interpreter import skip_without_interpreter
from torch import Tensor

from cacompile.kernels.segments import Batch, SegmentTable, Sent, StridedPartition, find_partition

skip_without_interpreter()

LAST = torch.channels_last
CASES = (  # shape, dim, block, memory format, elements before it in memory (odd ones cannot be read 16 bytes at a time)
    ((1,), 0, 1, None, 0),
    ((63,), 0, 5, None, 3),
    ((129, 7), 0, 16, None, 16),
    ((7, 129), 1, 16, None, 16),
    ((24, 32), 1, 16, None, 16),
    ((24, 32), 1, 16, None, 17),
    ((40, 8), 0, 16, None, 16),
    ((3, 1000), 1, 128, None, 16),
    ((4, 6, 10), 0, 1, None, 16),
    ((6, 8, 3, 2), 0, 4, LAST, 16),
    ((6, 5, 3, 2), 1, 2, LAST, 16),
)
CHUNK = 256
PAIRS = (  # of mean and mean square, or of gradient and moment
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
)
ROUNDING = {
    torch.float32: 1e-6,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
}  # the interpreter partitions bfloat16 off
WEIGHTS = {  # of what was computed, for each block
    "all left": lambda n: np.ones(n, np.float32),
    "all filled": lambda n: np.zeros(n, np.float32),
    "all again": lambda n: np.full(n, 1.5, np.float32),
    "last filled": lambda n: (np.arange(n) != n - 1).astype(np.float32),
    "mixed": lambda n: np.resize(np.array([0.0, 1.0, 2.0, 0.5], np.float32), n),
}


def placed(case: Any, dtype: torch.dtype, device: str, shift: int = 0) -> tuple[Tensor, Tensor]:
    """Random numbers as the case lies in memory, and all of that memory: NaN before and after."""
    shape, _, _, memory_format, before = case
    like = torch.empty(shape).to(memory_format=memory_format or torch.contiguous_format)
    room = torch.full((before + shift + like.numel() + 40,), torch.nan, dtype=dtype, device=device)
    tensor = room.as_strided(like.shape, like.stride(), before + shift)
    tensor.copy_(torch.randn(shape))
    return tensor, room


def partition_of(tensor: Tensor, case: Any) -> StridedPartition:
    partition = find_partition(tensor.shape, tensor.stride(), *case[1:3])
    assert partition is not None
    return partition


def table_of(batch: Batch, device: str, chunk: int = CHUNK) -> SegmentTable:
    return SegmentTable(batch.partitions, torch.device(device, 0) if device == "cuda" else torch.device(device), chunk)


def block_sums(tensor: Tensor, case: Any) -> list[Tensor]:
    return [rows.sum() for rows in tensor.split(case[2], case[1])]


def same(sums: Tensor, exact: list[Tensor], tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(sums.double().cpu(), torch.stack(exact).double().cpu(), rtol=tolerance, atol=0.0)


def adam_case(device: str, dtypes: tuple[torch.dtype, torch.dtype], on_device: bool) -> None:
    from cacompile.kernels.triton_segments import group_sums

    torch.manual_seed(0)
    batch, exact, held = Batch(), [], []
    for i, case in enumerate(CASES):
        (mean, _), (square, _) = placed(case, dtypes[0], device), placed(case, dtypes[1], device)
        square.abs_()
        beta1, beta2, eps, step = 0.9, 0.99, 10.0**-i if i % 2 else 0.0, 3.0 + i
        corrections = 1 / (1 - beta1**step), 1 / (1 - beta2**step)
        count = torch.tensor(step, device=device)
        held += [mean, square, count]
        logs = float(np.log2(beta1)), float(np.log2(beta2))
        batch.add(partition_of(mean, case), (mean, square, count if on_device else None),
                  (*(logs if on_device else corrections), eps))  # fmt: skip
        descent = (mean.double() * corrections[0]) ** 2 / ((square.double() * corrections[1]).sqrt() + eps)
        exact += block_sums(descent, case)
    table = table_of(batch, device)
    sums = [group_sums(table, table.send(batch), dtypes, adam=True) for _ in range(2)]
    same(sums[0], exact, 1e-5)
    assert torch.equal(*sums)


@pytest.mark.thin(2)
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("dtypes", PAIRS[:3], ids=str)
def test_descent_of_adam(launch: Any, dtypes: Any, on_device: bool):
    launch(adam_case, dtypes, on_device)


def square_case(device: str, dtype: torch.dtype) -> None:
    from cacompile.kernels.triton_segments import group_sums

    found = []
    for shift in (0, 1):
        torch.manual_seed(0)
        batch, exact, held = Batch(), [], []
        for i, case in enumerate(CASES):
            tensor, _ = placed(case, dtype, device, shift)
            held.append(tensor)
            batch.add(partition_of(tensor, case), (tensor, None, None), (0.25 * i, 0.0, 0.0))
            exact += block_sums(tensor.double().square() * 0.25 * i, case)
        table = table_of(batch, device)
        found.append(group_sums(table, table.send(batch), (dtype, dtype), adam=False))
        same(found[-1], exact)
    assert torch.equal(*found), "where tensors lie in memory must not show: the ranks of a job have to agree"


@pytest.mark.parametrize("dtype", ROUNDING)
def test_squares(launch: Any, dtype: torch.dtype):
    launch(square_case, dtype)


def long_case(device: str) -> None:
    """More chunks in a block than are added at a time, and chunks of the real size."""
    from cacompile.kernels.triton_segments import group_sums

    case = ((2, 4500), 0, 1, None, 0)
    tensor, _ = placed(case, torch.float32, device)
    batch = Batch()
    batch.add(partition_of(tensor, case), (tensor, None, None), (1.0, 0.0, 0.0))
    for chunk in (16, 4096):
        table = table_of(batch, device, chunk)
        sums = group_sums(table, table.send(batch), (torch.float32,) * 2, adam=False)
        same(sums, block_sums(tensor.double().square(), case))


def test_long_blocks(launch: Any):
    launch(long_case)


def fill_case(device: str, dtypes: tuple[torch.dtype, torch.dtype], choice: str, scaled: bool) -> None:
    from cacompile.kernels.triton_segments import fill_estimates

    torch.manual_seed(0)
    batch, weights, rooms = Batch(), [], []
    scale = torch.tensor(8.0, device=device)
    for i, case in enumerate(CASES):
        (grad, room), (moment, _), (param, _) = (placed(case, dtype, device) for dtype in (*dtypes, dtypes[0]))
        has_moment, decays = i % 4 != 3, i % 3 != 1 and i % 4 != 3
        partition = partition_of(grad, case)
        tensors = grad, moment if has_moment else None, param if decays else None, scale if scaled else None
        batch.add(partition, tensors, (0.5 if has_moment else 0.0, -0.25 if decays else 0.0))
        weights.append(WEIGHTS[choice](partition.blocks))
        weight = torch.from_numpy(np.repeat(weights[-1], case[2])[: case[0][case[1]]]).double().to(device)
        weight = weight.view([-1 if dim == case[1] else 1 for dim in range(grad.dim())])
        value = (moment.double() * 0.5 if has_moment else 0.0 * moment.double()) - 0.25 * decays * param.double()
        value *= 8.0 if scaled else 1.0
        value = value + weight * (grad.double() - value)
        grad.masked_fill_(weight == 0.0, torch.nan)  # must not be read
        expected, written = room.clone(), torch.zeros_like(room, dtype=torch.bool)
        layout = grad.shape, grad.stride(), grad.storage_offset()
        expected.as_strided(*layout).copy_(torch.where(weight == 1.0, grad, value.to(grad.dtype)))
        written.as_strided(*layout).copy_((weight != 1.0).expand(grad.shape))
        rooms.append((room, expected, written, (moment, param)))
    table = table_of(batch, device)
    fill_estimates(table, table.send(batch, np.concatenate(weights)), (*dtypes, dtypes[0]))
    for room, expected, written, _ in rooms:
        bits = {4: torch.int32, 2: torch.int16}[room.element_size()]
        assert torch.equal(room.view(bits)[~written], expected.view(bits)[~written]), "what has weight 1 has changed"
        torch.testing.assert_close(room[written], expected[written], rtol=ROUNDING[room.dtype], atol=1e-5)


@pytest.mark.thin(4)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("choice", WEIGHTS)
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_fill(launch: Any, dtypes: Any, choice: str, scaled: bool):
    launch(fill_case, dtypes, choice, scaled)


def nothing_case(device: str) -> None:
    from cacompile.kernels.triton_segments import fill_estimates, group_sums

    table = table_of(Batch(), device)
    empty = torch.empty(0, device=device)
    assert group_sums(table, Sent(empty, empty, empty), (torch.float32,) * 2, adam=True).shape == (0,)
    fill_estimates(table, Sent(empty, empty, empty), (torch.float32,) * 3)


def test_nothing_to_do(launch: Any):
    launch(nothing_case)
