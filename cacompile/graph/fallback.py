"""The net under everything of ours: where it fails, the inner compiler alone serves, and one warning says so."""

from __future__ import annotations

import logging

import torch

from cacompile.version import VERSION

REPORT = "Please report this with the output of `python -m cacompile doctor`"

_said: set[str] = set()
"""Faults that were told of; each once a process."""


def warn_of_fault(log: logging.Logger, what: str, instead: str, *, trace: bool = True) -> None:
    """Say once that something of ours has failed.

    what: was being done; instead: what happens now; trace: with the traceback of the exception that is being handled.
    """
    if what not in _said:
        _said.add(what)
        message = "cacompile %s failed at %s, on torch %s: %s. %s"
        log.warning(message, VERSION, what, torch.__version__, instead, REPORT, exc_info=trace)
