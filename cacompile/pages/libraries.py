"""Libraries that only some users need."""

from __future__ import annotations

import importlib
from types import ModuleType

from cacompile.errors import ConvAwareError


def library(name: str, extra: str) -> ModuleType:
    """A library that only some reports need."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ConvAwareError(
            f"this report needs {package if package != 'torch' else extra}: pip install 'cacompile[{extra}]' ({error})"
        ) from error
