"""Adapters of optimizers: one for each kind, found by its class or by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import (
    SGD,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
)

from cacompile.errors import ConvAwareError, shown

from .adam import AdaBoundAdapter, AdamAdapter, AdamaxAdapter, AdamMiniAdapter, AdanAdapter, LambAdapter
from .base import Kept, OptimizerAdapter, Statistic, Term, descent, gradient_statistic
from .sgd import RMSpropAdapter, SGDAdapter
from .signs import LionAdapter, MuonAdapter
from .squares import AdafactorAdapter, AdagradAdapter

__all__ = [
    "Kept",
    "OptimizerAdapter",
    "Statistic",
    "Term",
    "adapter_of",
    "descent",
    "estimate_of",
    "gradient_statistic",
    "register_optimizer",
    "statistic_of",
]

_COUPLED_ADAM = AdamAdapter(coupled_decay=True)
_UNKNOWN = OptimizerAdapter()

_by_class: dict[type, OptimizerAdapter] = {
    **dict.fromkeys((Adam, NAdam, RAdam), _COUPLED_ADAM),
    AdamW: AdamAdapter(),
    Adamax: AdamaxAdapter(),
    SGD: SGDAdapter(),
    RMSprop: RMSpropAdapter(),
    Adagrad: AdagradAdapter(),
    Adafactor: AdafactorAdapter(),
}
if hasattr(torch.optim, "Muon"):  # not in every torch
    _by_class[torch.optim.Muon] = MuonAdapter()

_by_name: dict[str, OptimizerAdapter] = {
    "AdamW": AdamAdapter(),  # transformers
    "Lion": LionAdapter(),
    "bitsandbytes.AdamW": AdamAdapter(mean="state1", squares=("state2",)),
    "bitsandbytes.Lion": LionAdapter(mean="state1"),
    # pytorch_optimizer, torch_optimizer
    **dict.fromkeys(("AdamP", "DiffGrad", "RAdam", "Yogi"), AdamAdapter()),
    "AdaBound": AdaBoundAdapter(squares=("max_exp_avg_sq", "exp_avg_sq")),
    "AdaBelief": AdamAdapter(squares=("max_exp_avg_var", "exp_avg_var")),
    "StableAdamW": AdamAdapter(biased=False),
    "Lamb": LambAdapter(),
    "Adan": AdanAdapter(),
    "Adam_mini": AdamMiniAdapter(mean="m"),
    "AdamMini": AdamMiniAdapter(mean="m"),
}
"""Classes outside torch, by name, or package and name; seen in docs/pipelines.md."""

_found: dict[type, OptimizerAdapter] = {}
"""What was looked up before: asked for every parameter in every step."""


def register_optimizer(kind: type[Optimizer] | str, adapter: OptimizerAdapter) -> None:
    """Let an adapter speak for a class of optimizers and what derives from it, or for all classes of a name.

    kind: a subclass of torch.optim.Optimizer, a class's name, or "package.Name" with its top package. What was known of
    that very kind before is replaced. Raises ConvAwareError for anything else.
    """
    if not isinstance(adapter, OptimizerAdapter):
        raise ConvAwareError(f"adapter must be an instance of OptimizerAdapter, got {shown(adapter)}")
    if isinstance(kind, str) and kind.replace(".", "", 1).isidentifier():
        _by_name[kind] = adapter
    elif isinstance(kind, type) and issubclass(kind, Optimizer):
        _by_class[kind] = adapter
    else:
        raise ConvAwareError(
            f"optimizer must be a subclass of torch.optim.Optimizer, 'Name' or 'package.Name', got {shown(kind)}"
        )
    _found.clear()


def adapter_of(optimizer: Optimizer) -> OptimizerAdapter:
    """The adapter for an optimizer; one that knows nothing where none is registered."""
    kind: Any = type(optimizer)
    if (adapter := _found.get(kind)) is None:
        adapter = _found[kind] = _look_up(kind)
    return adapter


def estimate_of(optimizer: Optimizer, settings: Mapping[str, Any], param: torch.Tensor) -> list[Term]:
    """The gradient that a skipped slice of the parameter is taken to have, as a sum of terms; empty for zeros.

    settings: of the parameter's group. Raises TypeError for what an adapter may not say, and whatever it raises.
    """
    kept = Kept.of(optimizer, settings, param)
    terms = adapter_of(optimizer).estimate(kept)
    for tensor, _ in terms:
        if not isinstance(tensor, torch.Tensor) or tensor.shape != kept.param.shape:
            raise TypeError(
                f"a term of an estimate must be a tensor of shape {list(kept.param.shape)}, got {shown(tensor)}"
            )
    return terms


def statistic_of(
    optimizer: Optimizer | None, settings: Mapping[str, Any], param: torch.Tensor, seen: int
) -> Statistic | None:
    """What the optimizer keeps of the parameter; None where nothing is known, which leaves `gradient_statistic`.

    settings: of the parameter's group; seen: optimizer steps so far, for optimizers that do not count. Raises
    TypeError for what an adapter may not say, and whatever it raises.
    """
    if optimizer is None:
        return None
    found = adapter_of(optimizer).statistic(Kept.of(optimizer, settings, param, seen))
    if found is not None and not isinstance(found, Statistic):
        raise TypeError(f"a statistic must be a Statistic or None, got {shown(found)}")
    return found


def _look_up(kind: type) -> OptimizerAdapter:
    for base in kind.__mro__:
        if base in _by_class:
            return _by_class[base]
    package = kind.__module__.partition(".")[0]
    return _by_name.get(f"{package}.{kind.__name__}") or _by_name.get(kind.__name__) or _UNKNOWN
