"""What all integrations have in common: the numbers they log, and what they say when something is missing."""

from __future__ import annotations

import logging

import torch

from cacompile.sessions.session import session
from cacompile.sessions.status import status
from cacompile.torch_internals import warning_once

log = logging.getLogger(__name__)

BACKEND = "convaware"


def numbers(model: torch.nn.Module) -> dict[str, float]:
    """Where training stands, as numbers to log; empty, and said once, if no graph of the model is convaware's.

    `convaware/skipped_dw`: share of all dW FLOPs that the next step skips, 0 to 1. `convaware/keep`: mean probability
    of being kept, over all groups. `convaware/saved_flops`: dW FLOPs left out so far; `convaware/saved_dw`: the same as
    a share of what a dense run would have spent on dW by now; `convaware/saved_step`: of what it would have spent on
    forward and backward passes.
    """
    if not session(model).bindings:
        warning_once(
            log, "nothing of %s is compiled by convaware: there is nothing to log or save", type(model).__name__
        )
        return {}
    now = status(model)
    return {
        "convaware/skipped_dw": now.skipped_flops,
        "convaware/keep": now.keep,
        "convaware/saved_flops": now.saved_flops,
        "convaware/saved_dw": now.saved_flops / now.total_flops if now.total_flops else 0.0,
        "convaware/saved_step": now.saved_flops / now.step_flops if now.step_flops else 0.0,
    }


def missing(library: str, error: ImportError) -> ImportError:
    """The error for a library that is not installed, with how to get it."""
    here = f"cacompile.integrations.{library}"
    return ImportError(
        f"{here} needs {library}, which cannot be imported ({error}); pip install 'cacompile[{library}]'"
    )
