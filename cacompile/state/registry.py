"""The registry: which parameters of the process are under our care, and the state of each."""

from __future__ import annotations

import logging
from typing import Any

import torch

from .identity import find_identity, identity_of, known
from .keys import forget_keys
from .params import ParamState
from .shards import owner_of

log = logging.getLogger(__name__)


class _Registry:
    """The states of all parameters of the process that are under our care, by identity, weakly."""

    def all(self) -> list[ParamState]:
        return list(dict.fromkeys(identity.data for identity in known() if identity.data is not None))

    def find(self, param: Any) -> ParamState | None:
        identity = find_identity(param)
        return None if identity is None else identity.data

    def track(self, param: torch.nn.Parameter, name: str) -> ParamState:
        """The state of a parameter; what was gathered for a forward pass has that of the shards it was made of."""
        identity = identity_of(param)
        if identity.data is None:
            owner = owner_of(param)
            identity.data = ParamState(param, name) if owner is None else self.track(owner, name)
        return identity.data

    def track_anew(self, param: torch.nn.Parameter, name: str) -> ParamState:
        """A parameter of another shape than before, as after a swap: nothing of its blocks holds any more."""
        identity = identity_of(param)
        before = identity.data
        log.warning("%s was %s and is %s now; its groups start anew", before.name, before.shape, tuple(param.shape))
        identity.end()
        return self.track(param, name)

    def forget(self) -> None:
        """Names count from zero again, as after a step or `torch._dynamo.reset()`; live parameters keep their state."""
        forget_keys()


registry = _Registry()
