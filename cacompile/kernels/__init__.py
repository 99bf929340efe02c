"""The masked operations: each one file with its reference, op, fake, CPU path and launch; importing registers them."""

from .masked_bmm import masked_bmm, masked_bmm_reference
from .masked_conv import masked_conv_dw, masked_conv_dw_reference
from .masked_grouped_mm import masked_grouped_mm, masked_grouped_mm_reference
from .masked_mm import masked_mm, masked_mm_reference

__all__ = [
    "masked_bmm",
    "masked_bmm_reference",
    "masked_conv_dw",
    "masked_conv_dw_reference",
    "masked_grouped_mm",
    "masked_grouped_mm_reference",
    "masked_mm",
    "masked_mm_reference",
]
