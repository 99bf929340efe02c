"""A session for `torch.distributed.checkpoint`: one value, the same on all ranks, for any number of ranks to load."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import distributed as dist

from .session import session


class StatefulSession:
    """Saves and loads the session of a model as a part of what `torch.distributed.checkpoint` saves and loads.

        dcp.save({"model": ..., "optimizer": ..., "convaware": cacompile.StatefulSession(model)}, checkpoint_id=folder)

    What is saved is what each rank knows, with shapes of whole parameters. As many ranks go on exactly as they would
    have; any other number of them, or one process, with what rank 0 knew. Both are collectives, as all of
    `torch.distributed.checkpoint`.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        """Raises ConvAwareError as `cacompile.session` does."""
        self._session = session(model)

    def state_dict(self) -> dict[str, Any]:
        """The state as bytes: what it is made of depends on how far training has come, which who loads cannot know."""
        ranks: list[Any] = [None] * _ranks()
        own = _packed(self._session.state_dict())
        if len(ranks) > 1:
            dist.all_gather_object(ranks, own)
        return {"state": _packed({"ranks": ranks if len(ranks) > 1 else [own]})}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ConvAwareError for a state that is none, or of another model."""
        self._session.load_state_dict(unpacked(state["state"]))


def unpacked(data: bytes) -> Any:
    """The state that this rank goes on with, of the bytes that a StatefulSession makes: its own, or rank 0's."""
    found = _unpacked(data)
    if isinstance(ranks := found.get("ranks"), list):
        found = _unpacked(ranks[dist.get_rank() if 1 < len(ranks) == _ranks() else 0])
    return found


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _packed(state: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _unpacked(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)
