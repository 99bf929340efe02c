"""Names for masked operations in a profiler's trace: which parameter's dW it is, and how much of it is on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from cacompile.torch_internals import Range

_local = threading.local()


@contextlib.contextmanager
def named(labels: Mapping[int, str]) -> Iterator[None]:
    """Masked operations that this thread runs get a range of their own. labels: of each first_flag among the flags."""
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
    """The first block of the masked dimension: operations take first_flags, then blocks, after all their tensors."""
    first_flags, blocks, *_ = [arg for arg in args if arg is not None and not isinstance(arg, Tensor)]
    if isinstance(first_flags, int):
        return first_flags
    return next((first_flag for first_flag, block in zip(first_flags, blocks) if block), None)
