"""Follows `Join`, under which ranks run out of batches one by one, and then go on with what the last of them have."""

from __future__ import annotations

from typing import Any

from cacompile.state.replicas import agreements_of, can_agree
from cacompile.torch_internals import follow_joins


def follow_joining() -> None:
    """Have agreements told when this rank joins, and when all have; once."""
    if can_agree():
        follow_joins(_joined, _together)


def _joined(wrapper: Any) -> None:
    for agreement in agreements_of(wrapper):
        agreement.joined()


def _together(wrapper: Any, last: bool) -> None:
    for agreement in agreements_of(wrapper):
        agreement.together(last)
