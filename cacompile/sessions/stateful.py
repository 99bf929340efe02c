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

    What is saved is what rank 0 knows, which is everybody's, with shapes of whole parameters: it may be loaded by
    another number of ranks, or by one process. Both are collectives, as all of `torch.distributed.checkpoint`.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        """Raises ConvAwareError as `cacompile.session` does."""
        self._session = session(model)

    def state_dict(self) -> dict[str, Any]:
        """The state as bytes: what it is made of depends on how far training has come, which who loads cannot know."""
        packed: list[Any] = [None]
        alone = not dist.is_available() or not dist.is_initialized()
        if alone or dist.get_rank() == 0:
            buffer = io.BytesIO()
            torch.save(self._session.state_dict(), buffer)
            packed = [buffer.getvalue()]
        if not alone:
            dist.broadcast_object_list(packed)
        return {"state": packed[0]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ConvAwareError for a state that is none, or of another model."""
        self._session.load_state_dict(torch.load(io.BytesIO(state["state"]), weights_only=True))
