"""Names for masked operations in a profiler's trace: which parameter's dW it is, and how much of it is on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch._C._profiler import _RecordFunctionFast as Range

_local = threading.local()


@contextlib.contextmanager
def named(labels: Mapping[int, str]) -> Iterator[None]:
    """Masked operations that this thread runs get a range of their own. labels: of each slot among the flags."""
    before = getattr(_local, "labels", None)
    _local.labels = labels
    try:
        yield
    finally:
        _local.labels = before


def range_of(args: Sequence[Any]) -> contextlib.AbstractContextManager[object]:
    """The range of an operation with these arguments; only asked for while a profiler runs."""
    labels = getattr(_local, "labels", None)
    label = labels.get(_slot(args)) if labels else None
    return contextlib.nullcontext() if label is None else Range(label)


def _slot(args: Sequence[Any]) -> int | None:
    """The first block of the masked dimension: operations take slots, then blocks, after all their tensors."""
    slots, blocks, *_ = [arg for arg in args if arg is not None and not isinstance(arg, Tensor)]
    if isinstance(slots, int):
        return slots
    return next((slot for slot, block in zip(slots, blocks) if block), None)
