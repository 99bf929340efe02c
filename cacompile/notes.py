"""Lines for whoever watches a training: what takes long, and what is to be known from the start."""

from __future__ import annotations

import logging

from torch import distributed

notes = logging.getLogger("cacompile.notes")
"""At INFO, and shown also where nobody has set up logging."""

SLOW = 5.0
"""Seconds of waiting that are told of."""


def say(text: str) -> None:
    """A line, from the first rank alone."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_rank():
        return
    if not notes.hasHandlers():
        notes.addHandler(logging.StreamHandler())
    if notes.level == logging.NOTSET:
        notes.setLevel(logging.INFO)
    notes.info(text)
