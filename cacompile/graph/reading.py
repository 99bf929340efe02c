"""Whether a backward's gradients go into `.grad`, or to the caller of `torch.autograd.grad`, who wants them whole."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch

from cacompile.torch_internals import get_gradient_edge, warning_once, will_engine_execute_node

log = logging.getLogger(__name__)


def reads_gradients(params: Iterable[torch.Tensor]) -> bool:
    """Whether the backward that is running hands the gradient of any of these parameters to its caller.

    One question where it accumulates, as training does: torch accumulates all that it computes, or nothing.
    """
    for param in params:
        try:
            if will_engine_execute_node(get_gradient_edge(param).node):
                return False
        except RuntimeError:  # raised for a leaf whose gradient is not accumulated but returned
            return True
    return False


def is_read(params: Iterable[torch.Tensor]) -> bool:
    """Whether the user gets these gradients in hand: then all are computed, which is said once."""
    if not reads_gradients(params):
        return False
    warning_once(
        log,
        "torch.autograd.grad asks for gradients of parameters of which some are skipped or frozen in this step: "
        "such a backward computes all of them. Weights that are often read so can be kept out by the option 'keep'",
    )
    return True
