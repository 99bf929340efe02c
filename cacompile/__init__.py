"""Training stops paying for what has converged: `torch.compile(model, backend="convaware")`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .unlinked import find_passes
from .version import VERSION

if TYPE_CHECKING:
    from cacompile.controller.optimizers import Statistic as Statistic
    from cacompile.explanation.explain import explain as explain
    from cacompile.hooks.reducing import reduce_less as reduce_less
    from cacompile.report.run import report_state as report_state
    from cacompile.sessions.session import session as session
    from cacompile.sessions.stateful import StatefulSession as StatefulSession
    from cacompile.sessions.status import status as status
    from cacompile.sessions.status import step as step

    from .config import Config as Config
    from .controller.optimizers import OptimizerAdapter as OptimizerAdapter
    from .controller.optimizers import register_optimizer as register_optimizer
    from .errors import ConvAwareError as ConvAwareError

__version__ = VERSION
find_passes()

_HOMES = {
    "Config": "config",
    "ConvAwareError": "errors",
    "OptimizerAdapter": "controller.optimizers",
    "StatefulSession": "sessions.stateful",
    "Statistic": "controller.optimizers",
    "explain": "explanation.explain",
    "reduce_less": "hooks.reducing",
    "register_optimizer": "controller.optimizers",
    "report_state": "report.run",
    "session": "sessions.session",
    "status": "sessions.status",
    "step": "sessions.status",
}

__all__ = [
    "Config",
    "ConvAwareError",
    "OptimizerAdapter",
    "StatefulSession",
    "Statistic",
    "__version__",
    "explain",
    "reduce_less",
    "register_optimizer",
    "report_state",
    "session",
    "status",
    "step",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
