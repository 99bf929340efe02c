"""What all integrations have in common: the numbers they log, what they say first, and what is said when one lacks."""

from __future__ import annotations

import logging

import torch

from cacompile.notes import say
from cacompile.sessions.status import Status, status
from cacompile.sessions.why import small_part
from cacompile.torch_internals import warning_once

log = logging.getLogger(__name__)

BACKEND = "convaware"


class Reporter:
    """Numbers of a model to log, and one line when they are asked for first."""

    def __init__(self) -> None:
        self._said = False

    def numbers(self, model: torch.nn.Module) -> dict[str, float]:
        """`status(model).to_dict()`; empty, and said once, if no graph of the model is convaware's."""
        now = status(model)
        if not now.can:
            warning_once(
                log, "nothing of %s is compiled by convaware: there is nothing to log or save", type(model).__name__
            )
            return {}
        if not self._said:
            self._said = True
            say(first_line(now))
        return now.to_dict()


def first_line(now: Status) -> str:
    """`8 of 12 weights can be skipped, from step 20 on. Nothing is skipped in the first 20 steps ...`."""
    parts = [f"convaware: {now.can}", small_part(now.dw_of_step, 1.0) if now.dw_of_step else "", now.why]
    return ". ".join(part.rstrip(".") for part in parts if part)


def missing(library: str, error: ImportError) -> ImportError:
    """The error for a library that is not installed, with how to get it."""
    here = f"cacompile.integrations.{library}"
    return ImportError(
        f"{here} needs {library}, which cannot be imported ({error}); pip install 'cacompile[{library}]'"
    )
