"""Shards: what this rank holds of a parameter that `fully_shard` (FSDP2) or tensor parallel has spread over ranks.

Under FSDP2 a forward pass gathers such a parameter into another one, which is what compiled graphs see. Optimizers step
the shard, so all that is known belongs to the sharded one. Under tensor parallel graphs see the shard: `share_of`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cacompile.layout import Partition, Share
from cacompile.torch_internals import (
    SHARDS,
    broken_contracts,
    fully_sharded,
    may_be_sharded,
    running_ddp,
    warning_once,
)

log = logging.getLogger(__name__)


def local(value: Any) -> Any:
    """What this rank holds of a DTensor; anything else as it is. Not differentiated."""
    if not hasattr(value, "to_local"):
        return value
    with torch.no_grad():
        return value.to_local()


def share_of(param: Any) -> Share | str:
    """What a graph has of a DTensor in the place of the whole: this rank's share; or why the share cannot be masked."""
    if param.device_mesh.ndim != 1:
        return f"is a DTensor on a mesh of {param.device_mesh.ndim} dimensions"
    (placement,), pieces = param.placements, param.device_mesh.size()
    if not placement.is_shard():
        return "is a DTensor of which all ranks have all, and of whose gradient each may have a part"
    if param.shape[placement.dim] % pieces:
        return (
            f"is a DTensor whose {param.shape[placement.dim]} rows along {placement.dim} {pieces} ranks share unevenly"
        )
    return Share(placement.dim, param.device_mesh.get_local_rank(), pieces)


def has_share(param: Any) -> bool:
    """Whether it is a DTensor of which a graph has this rank's share, and that it is what optimizers step."""
    if not hasattr(param, "to_local") or isinstance(share_of(param), str) or running_ddp() is not None:
        return False
    return not may_be_sharded() or bool(broken_contracts(SHARDS)) or fully_sharded(param) is None


def over_shards(param: Any, part: torch.Tensor, how: str) -> torch.Tensor:
    """What the ranks that hold shards of a parameter have together. how: "sum" or "max". A collective."""
    from torch.distributed.tensor import DTensor, Partial, Replicate  # there already, where there are shards

    placements = [Partial(how) if placement.is_shard() else Replicate() for placement in param.placements]
    return DTensor.from_local(part, param.device_mesh, placements, run_check=False).full_tensor()


def with_replicas(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A DTensor, the same on all ranks, of what `change` makes of this one."""
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = [Replicate()] * value.device_mesh.ndim
    changed = change(value.redistribute(placements=everywhere).to_local())
    return DTensor.from_local(changed, value.device_mesh, everywhere, run_check=False)


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows `start:stop` of a parameter along dimension `dim` lie on this rank."""

    dim: int
    start: int
    stop: int
    counts: bool
    """Whether this rank speaks for them: of ranks that hold copies of the same rows one does."""

    @classmethod
    def of(cls, param: Any) -> Shard | None:
        """The shard of a DTensor that lies in equal pieces along one dimension; None for any other, and for tensors."""
        if not hasattr(param, "to_local"):
            return None
        mesh, shape = param.device_mesh, param.shape
        coordinate = mesh.get_coordinate()
        along = [(i, p.dim) for i, p in enumerate(param.placements) if p.is_shard()]
        if coordinate is None or len(along) > 1 or any(p.is_partial() for p in param.placements) or not shape:
            return None
        counts = not any(of for i, of in enumerate(coordinate) if not param.placements[i].is_shard())
        if not along:
            return cls(0, 0, shape[0], counts)
        (axis, dim), size = along[0], mesh.size(along[0][0])
        piece = -(-shape[dim] // size)
        start, stop = (min(shape[dim], piece * (coordinate[axis] + i)) for i in (0, 1))
        expected = (*shape[:dim], stop - start, *shape[dim + 1 :])
        return cls(dim, start, stop, counts) if tuple(local(param).shape) == expected else None

    def rows(self, partition: Partition) -> tuple[int, int]:
        """First and last but one of the parted rows that lie here, if only in part."""
        return (self.start, self.stop) if partition.dim == self.dim else (0, partition.rows)


def owner_of(param: Any) -> torch.nn.Parameter | None:
    """What optimizers step in the place of this parameter, maskable or not; None for one that they step itself."""
    if (owner := stepped(param)) is not None or not (hasattr(param, "to_local") and may_be_sharded()):
        return owner
    found = None if broken_contracts(SHARDS) else fully_sharded(param)
    return None if found is None else found.param


def stepped(param: Any) -> torch.nn.Parameter | None:
    """The sharded parameter that optimizers step in the place of this gathered one; None for any other."""
    if not may_be_sharded() or hasattr(param, "to_local"):
        return None
    if broken := broken_contracts(SHARDS):
        reasons = "; ".join(map(str, broken))
        warning_once(log, "what fully_shard has spread over ranks cannot be found here, and stays dense: %s", reasons)
        return None
    if (found := fully_sharded(param)) is None:
        return None
    if Shard.of(found.param) is None:
        warning_once(log, "%s stays dense: it is sharded as %s", found.name, tuple(found.param.placements))
        return None
    return found.param
