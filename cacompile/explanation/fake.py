"""Models without values: on meta, made under a FakeTensorMode, or spread over ranks by `fully_shard`.

They are looked at as they are, in no memory; what is spread without a word to other ranks, which may not look.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from cacompile.torch_internals import (
    FakeTensor,
    FakeTensorMode,
    detect_fake_mode,
    disable_current_modes,
    forward_hooks,
    tensor_stores,
    tree_map_only,
)

HOME = torch.device("cpu")
"""Where what is on meta is taken to be: of operations on meta Inductor leaves nothing."""

FSDP = "torch.distributed.fsdp"
"""Where the hooks of `fully_shard` come from."""

Call = tuple[dict[int, torch.Tensor], Sequence[Any], Mapping[str, Any]]
"""The model's own tensor for the id of each stand-in, and the arguments to call it with."""


@contextlib.contextmanager
def faked(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Call]:
    """Have a model without values run on fake tensors; any other stays as it is.

    What is on meta stands on the CPU meanwhile: the model's parameters, buffers and attributes are put back.
    """
    tensors = [*model.parameters(), *model.buffers()]
    mode = detect_fake_mode([tensor for tensor in tensors if isinstance(tensor, FakeTensor)])
    if mode is None and not any(tensor.is_meta or hasattr(tensor, "to_local") for tensor in tensors):
        yield {}, args, kwargs
        return
    mode = mode or FakeTensorMode()
    stand_ins = _StandIns(mode, gathered=any(map(_is_sharding, (hook for of in _hooks(model) for hook in of.values()))))
    # Dynamo has a mode of its own, and what runs between its graphs may make tensors that are not fake
    before, mode.allow_non_fake_inputs = mode.allow_non_fake_inputs, True
    try:
        with disable_current_modes(), stand_ins.inside(model), _without_sharding(model):
            args, kwargs = tree_map_only(torch.Tensor, stand_ins.of, (tuple(args), dict(kwargs)))
            yield stand_ins.originals, args, kwargs
    finally:
        mode.allow_non_fake_inputs = before


@contextlib.contextmanager
def _without_sharding(model: torch.nn.Module) -> Iterator[None]:
    """Leave out the hooks of `fully_shard`, which would gather parameters."""
    hooks = _hooks(model)
    before = [dict(of) for of in hooks]
    try:
        for of in hooks:
            for key in [key for key, hook in of.items() if _is_sharding(hook)]:
                del of[key]
        yield
    finally:
        for of, all_of_them in zip(hooks, before):
            of.clear()
            of.update(all_of_them)


def _like(part: torch.Tensor, tensor: Any) -> Any:
    """The DTensor that `part` is this rank's part of, and that lies on the ranks as `tensor` does."""
    from torch.distributed.tensor import DTensor  # there already, where there is one

    mesh, placements, shape, stride = tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride()
    with torch.no_grad():
        return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)


def _hooks(model: torch.nn.Module) -> list[dict[int, Any]]:
    return [of for module in model.modules() for of in forward_hooks(module)]


def _is_sharding(hook: Any) -> bool:
    return str(hook.__module__).startswith(FSDP)


class _StandIns:
    """Fake tensors that stand for others, one for each."""

    def __init__(self, mode: FakeTensorMode, gathered: bool) -> None:
        """gathered: whether `fully_shard` makes whole tensors of shards; else DTensors stand for DTensors."""
        self.mode, self.gathered = mode, gathered
        self.made: dict[int, torch.Tensor] = {}
        self.originals: dict[int, torch.Tensor] = {}

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in self.made:
            new = self._fake(tensor)
            self.made[id(tensor)], self.originals[id(new)] = new, tensor
        return self.made[id(tensor)]

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        device = HOME if tensor.is_meta else tensor.device
        part = tensor if self.gathered or not hasattr(tensor, "to_local") else tensor.detach().to_local()
        with self.mode, torch.no_grad():
            new = torch.empty_strided(part.shape, part.stride(), dtype=tensor.dtype, device=device)
        if part is not tensor:
            new = _like(new, tensor)
        if isinstance(tensor, torch.nn.Parameter):
            return torch.nn.Parameter(new, tensor.requires_grad)
        return new.requires_grad_(tensor.requires_grad)

    @contextlib.contextmanager
    def inside(self, model: torch.nn.Module) -> Iterator[None]:
        """In the place of all tensors of the model, also of those that are no buffers."""
        places = [
            (store, name, value)
            for module in model.modules()
            for store in tensor_stores(module)
            for name, value in store.items()
            if isinstance(value, torch.Tensor)
        ]
        try:
            for store, name, value in places:
                store[name] = self.of(value)
            yield
        finally:
            for store, name, value in places:
                store[name] = value
