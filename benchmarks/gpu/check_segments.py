"""The kernels over blocks of many tensors, one launch for all, against plain PyTorch in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from cacompile.kernels.segments import Batch, SegmentTable, StridedPartition, find_partition

PARTITIONS = (  # shape, channels last, dim, block
    ((300, 70), False, 0, 128),
    ((96, 513), False, 1, 64),
    ((128, 16, 3, 3), True, 0, 64),
    ((5000,), False, 0, 128),
    ((4, 64, 48), False, 0, 1),
)


def tensors(dtype: torch.dtype, device: str) -> list[Tensor]:
    """One random tensor for each of PARTITIONS."""
    made = [torch.randn(shape, device=device).to(dtype) for shape, *_ in PARTITIONS]
    return [t.to(memory_format=torch.channels_last) if last else t for t, (_, last, *_) in zip(made, PARTITIONS)]


def _table(like: list[Tensor], device: str) -> tuple[SegmentTable, list[StridedPartition]]:
    found = [find_partition(tuple(t.shape), t.stride(), dim, block) for t, (_, _, dim, block) in zip(like, PARTITIONS)]
    partitions = [part for part in found if part is not None]
    assert len(partitions) == len(PARTITIONS), "a dense tensor was refused"
    return SegmentTable(partitions, torch.device(device)), partitions


def fills(dtype: torch.dtype, device: str) -> float:
    """Fills blocks of gradients with scale * (by_x * x + by_y * y), or weights them up around it; weight 1 is left."""
    from cacompile.kernels.triton_segments import fill_estimates

    roles = [[t.mul_(1 + role) for t in tensors(dtype, device)] for role in range(3)]
    before = [grad.clone() for grad in roles[0]]
    table, partitions = _table(roles[0], device)
    scale = torch.tensor([3.0], device=device)
    batch = Batch()
    for i, (part, grad, x, y) in enumerate(zip(partitions, *roles)):
        batch.add(part, (grad, x, y if i % 2 else None, scale if i > 1 else None), (0.5, -0.25))
    weights = torch.tensor([0.0, 1.0, 1.5])[torch.randint(0, 3, (table.blocks,))]
    fill_estimates(table, table.send(batch, weights.numpy()), [dtype] * 3)
    worst, first = 0.0, 0
    for i, (part, old, (grad, x, y)) in enumerate(zip(partitions, before, zip(*roles))):
        exact = 0.5 * x.double() - (0.25 * y.double() if i % 2 else 0.0)
        exact *= 3.0 if i > 1 else 1.0
        weight = weights[first : first + part.blocks].repeat_interleave(part.block)[: part.shape[part.dim]].to(device)
        weight = weight.view([-1 if dim == part.dim else 1 for dim in range(len(part.shape))])
        assert bool((grad == old)[(weight == 1.0).expand(grad.shape)].all()), "a block that has weight 1 has changed"
        exact += weight.double() * (old.double() - exact)
        error = float((grad.double() - exact).norm() / exact.norm())
        limit = 2 * torch.finfo(dtype).eps
        assert error <= limit, f"relative error {error:.2g}, allowed {limit:.2g}"
        worst, first = max(worst, error), first + part.blocks
    return worst


def sums_of_groups(dtype: torch.dtype, device: str) -> float:
    """Adam's expected descent over every block; the same bits each time."""
    from cacompile.kernels.triton_segments import group_sums

    means, squares = tensors(dtype, device), [t.abs_() for t in tensors(dtype, device)]
    table, partitions = _table(means, device)
    step = torch.tensor(7.0, device=device)
    batch = Batch()
    for i, (part, mean, square) in enumerate(zip(partitions, means, squares)):
        on_device = i % 2  # the optimizer's count of steps, and so the corrections for it
        factors = (_log2(0.9), _log2(0.99), 1e-3) if on_device else (1 / (1 - 0.9**7), 1 / (1 - 0.99**7), 1e-3)
        batch.add(part, (mean, square, step if on_device else None), factors)
    sent = table.send(batch)
    found = group_sums(table, sent, (dtype, dtype), True)
    assert bool((found == group_sums(table, sent, (dtype, dtype), True)).all()), "a second run gives other bits"
    exact = []
    for part, mean, square in zip(partitions, means, squares):
        m, v = mean.double() / (1 - 0.9**7), square.double() / (1 - 0.99**7)
        exact += [piece.sum() for piece in (m * m / (v.sqrt() + 1e-3)).split(part.block, part.dim)]
    error = float(((found.double() - torch.stack(exact)) / torch.stack(exact)).abs().max())
    assert error <= 1e-4, f"relative error {error:.2g}, allowed 1e-4"
    return error


def _log2(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).log2())
