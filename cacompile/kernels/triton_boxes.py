"""Operands as the tensor memory accelerator (sm_90 on) reads them: descriptors of boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

WITH_TMA = ("sm_90", "sm_100")
"""Architectures that have it."""


class Boxes(NamedTuple):
    """How a descriptor sees matrices [E, R, C]: its dimension of stride 1 last."""

    shape: list[int]
    strides: list[int]
    box: list[int]

    @classmethod
    def of(
        cls, shape: Sequence[int], strides: Sequence[int], itemsize: int, turned: bool, box: tuple[int, int]
    ) -> Boxes | None:
        """Boxes of `box` rows and columns; `turned` if R is the dimension of stride 1; None where it cannot be read."""
        outer, inner = (2, 1) if turned else (1, 2)
        aligned = 16 // itemsize
        seen = [shape[0], shape[outer], shape[inner]]
        # of a dimension of size 1 the stride says nothing, and must still be no less than what lies inside it
        row = strides[outer] if shape[outer] > 1 else -(-shape[inner] // aligned) * aligned
        steps = [strides[0] if shape[0] > 1 else shape[outer] * row, row]
        fits = strides[inner] == 1 and all(step > 0 and step % aligned == 0 for step in steps)
        return cls(seen, [*steps, 1], [1, box[outer - 1], box[inner - 1]]) if fits and min(seen) > 0 else None

    def over(self, matrices: Tensor) -> TensorDescriptor:
        """The descriptor, of matrices whose first element is 16-byte aligned."""
        made = TensorDescriptor.__new__(TensorDescriptor)  # its own checks, made above, take 4 us
        made.base, made.shape, made.strides, made.block_shape = matrices, self.shape, self.strides, self.box
        return made
