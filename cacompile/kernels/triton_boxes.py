"""Operands as the tensor memory accelerator (sm_90 on) reads them: descriptors of boxes."""

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

WITH_TMA = ("sm_90", "sm_100")
"""Architectures that have it."""


def takes_box(matrices: Tensor, turned: bool) -> bool:
    """Whether the tensor memory accelerator can read tiles of [E, R, C], `turned` if R is the dimension of stride 1."""
    outer, inner = (2, 1) if turned else (1, 2)
    return (
        matrices.stride(inner) == 1
        and matrices.data_ptr() % 16 == 0
        and all(
            matrices.shape[d] == 1
            or (matrices.stride(d) > 0 and matrices.stride(d) * matrices.element_size() % 16 == 0)
            for d in (0, outer)
        )
        and 0 < max(matrices.shape) < 2**31
        and matrices.numel() > 0
    )


def boxed(matrices: Tensor, turned: bool, box: tuple[int, int]) -> TensorDescriptor:
    """A descriptor of [E, R, C] in boxes, its contiguous dimension last; see `takes_box`."""
    outer, inner = (2, 1) if turned else (1, 2)
    shape = [matrices.shape[0], matrices.shape[outer], matrices.shape[inner]]
    aligned = 16 // matrices.element_size()
    strides = [matrices.stride(d) if matrices.shape[d] > 1 else aligned for d in (0, outer)]
    return TensorDescriptor(matrices, shape, [*strides, 1], [1, box[outer - 1], box[inner - 1]])
