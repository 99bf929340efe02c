"""A saved agreement that waits for the first step of its optimizer, and what all ranks skip until then."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .params import ParamState


@dataclass(eq=False)
class Resumed:
    """What a saved state says of an agreement, and the parameters that it is of."""

    saved: Mapping[str, Any]
    """Of `Agreement.save`, with names of parameters."""
    params: Mapping[str, ParamState]

    @classmethod
    def by_name(cls, agreements: Iterable[Mapping[str, Any]], params: Mapping[str, ParamState]) -> dict[str, Resumed]:
        """For each parameter that one of these is of, that one."""
        each = (cls(saved, params) for saved in agreements)
        return {name: resumed for resumed in each for name in resumed.saved["members"]}

    @property
    def fits(self) -> bool:
        """Whether all parameters that it decides on are parted as they were."""
        return all(
            name in self.params and self.params[name].blocks == blocks
            for part in self.saved["parts"]
            for name, blocks in zip(part["places"], part["blocks"])
        )

    def mask_of(self, param: ParamState) -> np.ndarray | None:
        """The mask of a parameter's blocks, bool [blocks]; None if it says nothing of them."""
        for part in self.saved["parts"]:
            start = 0
            for name, blocks in zip(part["places"], part["blocks"]):
                if self.params.get(name) is param and blocks == param.blocks:
                    return part["on"][start : start + blocks].numpy()
                start += blocks
        return None
