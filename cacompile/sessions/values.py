"""Values of a saved state: of which types and sizes they may be, and the error that names one that is not."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from cacompile.config import LARGEST_SEED
from cacompile.errors import ConvAwareError, shown, unknown

ENTRY = "state_dict entry "

LARGEST = 2**62
"""Of counts: what has been counted, and some more, is to fit into int64."""

COUNT = f"an int >= 0 and <= {LARGEST}"


Demand = Callable[[bool, str, Any, str], None]


def demand_of(where: str) -> Demand:
    """`demand` for the parts of what is called so."""
    return lambda ok, what, value, allowed: demand(ok, f"{where}{what}", value, allowed)


def demand(ok: bool, what: str, value: Any, allowed: str) -> None:
    """Raise a ConvAwareError that names the value and what is allowed, unless that is so."""
    if ok:
        return
    if isinstance(value, torch.Tensor):
        got = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    else:
        got = shown(value)
    raise ConvAwareError(f"{ENTRY}{what} must be {allowed}, got {got}")


def keys(value: Any, wanted: Collection[str], where: str, *, others: bool = False) -> None:
    """Raise a ConvAwareError unless it is a mapping with these keys. others: whether there may be other keys."""
    if not isinstance(value, Mapping):
        raise ConvAwareError(f"{where} must be a mapping, got {type(value).__name__}")
    if lost := set(wanted) - value.keys():
        raise ConvAwareError(f"{where} lacks {', '.join(sorted(lost))}")
    if not others and (more := [key for key in value if key not in wanted]):
        raise unknown(f"key of {where}:", more[0], wanted)


def copied(value: Any) -> Any:
    """A copy of mappings, lists and tensors; what else there is cannot change."""
    if isinstance(value, Mapping):
        return {key: copied(each) for key, each in value.items()}
    if isinstance(value, list):
        return list(map(copied, value))
    return value.clone() if isinstance(value, torch.Tensor) else value


def is_row(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= sys.float_info.max


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


def checked_step(step: Any) -> int:
    """A number of optimizer steps done, as Python's own. Raises ConvAwareError for what is none."""
    whole = isinstance(step, numbers.Integral) and not isinstance(step, bool)
    if not whole or not is_count(int(step)):
        raise ConvAwareError(f"step must be {COUNT}, got {shown(step)}")
    return int(step)


def checked_loss(loss: Any) -> float:
    """A loss as Python's own number; a tensor of one is waited for. Raises ConvAwareError for what is none."""
    try:
        if not isinstance(loss, (str, bytes, bytearray, bool)):  # some of which float takes
            return float(loss)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise ConvAwareError(f"loss must be a number or a tensor of one, got {shown(loss)}")


def is_seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_SEED


def is_array(value: Any, dtype: torch.dtype, shape: int | tuple[int, ...]) -> bool:
    """Whether it can be taken over as values of this shape; an int: one value a block."""
    return (
        isinstance(value, torch.Tensor)
        and (value.device.type, value.layout) == ("cpu", torch.strided)
        and (value.dtype, tuple(value.shape)) == (dtype, shape if isinstance(shape, tuple) else (shape,))
        and not value.requires_grad
    )
