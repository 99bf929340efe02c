"""What a compiled graph depends on beside what torch puts into the keys of its caches."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import torch

import cacompile
import cacompile.passes
from cacompile.config import Config
from cacompile.passes.joint import GraphInputs
from cacompile.version import VERSION

from .version_cache import digest

READ = ("block_rows",)
"""Options that decide what is compiled; all others are read while training, and `inner` has no cache but Inductor."""


def cache_key(inputs: GraphInputs, config: Config, joint_pass: Callable[..., object] | None) -> str | None:
    """Of one graph; None where it cannot have any.

    joint_pass: the user's own, which is not a part of torch's keys: it must have a `uuid()` as Inductor's passes do.
    """
    uuid = None
    if joint_pass is not None:
        uuid = getattr(joint_pass, "uuid", lambda: None)()
        if uuid is None:
            return None
    options = [(name, getattr(config, name)) for name in READ]
    return digest([package_key(), torch.__version__, inputs, options, uuid])


@functools.cache
def package_key() -> str:
    """Our version, and a hash of our sources."""
    found = hashlib.sha256(VERSION.encode())
    for package in (cacompile, cacompile.passes):
        for folder in sorted(set(package.__path__)):
            for path in sorted(Path(folder).rglob("*.py")):
                found.update(path.read_bytes())
    return found.hexdigest()
