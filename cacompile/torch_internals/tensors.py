"""Tensors, modules and what autograd, the profiler and torch's utilities hold of them."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import profiler

from .lookup import resolve


def is_profiling() -> bool:
    """Whether a profiler runs; asked in every step."""
    return profiler._is_profiler_enabled


def storage_id(tensor: torch.Tensor) -> int:
    """The same number for all that share a tensor's storage, fakes too, as long as it lives."""
    return tensor.untyped_storage()._cdata


def writes(tensor: torch.Tensor) -> int:
    """How often a tensor's contents have been written to."""
    return tensor._version


def is_view(tensor: torch.Tensor) -> bool:
    """Whether autograd takes the tensor for a view of another."""
    return tensor._is_view()


def has_hooks(tensor: torch.Tensor) -> bool:
    """Whether something is called with the tensor's gradient, or keeps it."""
    return bool(tensor._backward_hooks) or tensor.retains_grad


def tensor_stores(module: torch.nn.Module) -> tuple[dict[str, Any], ...]:
    """The dictionaries in which a module may hold tensors: parameters, buffers, plain attributes."""
    return module._parameters, module._buffers, vars(module)


def forward_hooks(module: torch.nn.Module) -> tuple[dict[int, Any], ...]:
    """The dictionaries of what is called before and after a module's forward pass."""
    return module._forward_pre_hooks, module._forward_hooks


def replace_total_norm(norm: Callable[..., Any]) -> bool:
    """Let `clip_grad_norm_` take its norm from `norm`; False in a torch where it does not look it up by that name."""
    module = resolve("clip_grad")
    if "_get_total_norm" not in inspect.unwrap(module.clip_grad_norm_).__code__.co_names:
        return False
    module._get_total_norm = norm
    return True


def replace_swap_tensors(
    around: Callable[..., contextlib.AbstractContextManager[None]], before: Callable[[Any], None]
) -> None:
    """Let `torch.utils.swap_tensors`, which refuses tensors that have weak references, run inside `around(t1, t2)`.

    before(tensor) is called where the function was imported by name before, when it looks for weak references.
    """
    swap = resolve("swap_tensors")

    class Weakref(types.ModuleType):
        @staticmethod
        def getweakrefs(tensor: Any) -> list[Any]:
            before(tensor)
            return weakref.getweakrefs(tensor)

        def __getattr__(self, name: str) -> Any:
            return getattr(weakref, name)

    if isinstance(swap, types.FunctionType) and swap.__globals__.get("weakref") is weakref:
        swap.__globals__["weakref"] = Weakref("weakref")

    @functools.wraps(swap)
    def swap_tensors(t1: Any, t2: Any) -> Any:
        with around(t1, t2):
            return swap(t1, t2)

    torch.utils.swap_tensors = swap_tensors
