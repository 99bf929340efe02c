"""Training stops paying for what has converged: `torch.compile(model, backend="convaware")`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import Config as Config
    from .errors import ConvAwareError as ConvAwareError
    from .report.explain import explain as explain
    from .report.run import report_state as report_state
    from .report.status import status as status
    from .report.status import step as step
    from .runtime.session import session as session

__version__ = "0.1.0"

_HOMES = {
    "Config": "config",
    "ConvAwareError": "errors",
    "explain": "report.explain",
    "report_state": "report.run",
    "session": "runtime.session",
    "status": "report.status",
    "step": "report.status",
}

__all__ = ["Config", "ConvAwareError", "__version__", "explain", "report_state", "session", "status", "step"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
