"""Where a backward ends between graphs: outputs that let no gradient through, and how the next graph knows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction

from cacompile.state.registry import registry
from cacompile.torch_internals import has_hooks, is_view, writes

FARTHEST = 2000
"""Autograd nodes that are looked at; where there are more, gradients are computed."""


class _End(torch.autograd.Function):
    """Gives tensors that want a gradient, as others of the graph do, and drops the gradient that comes.

    In place of detached tensors, whose `requires_grad` would have Dynamo compile what comes after them again.
    """

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, values: list[Any]) -> Any:
        ctx.set_materialize_grads(False)
        ctx.is_end = True
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, None]:
        return None, None


@functools.cache
def _anchor() -> torch.Tensor:
    """What makes autograd take note of the outputs: a tensor that wants a gradient, and never gets any."""
    return torch.zeros((), device="cpu", requires_grad=True)


class Endings:
    """Runs a graph whose parameters are all frozen, and below which nothing wants a gradient, forward only."""

    def __init__(self) -> None:
        self._wanting: list[int] = []
        """Outputs that require a gradient."""
        self._asked: tuple[int, ...] | None = None
        """Inputs that want a gradient and are no parameters of the graph."""
        self.seen = False
        """Whether it has run once, and so it is known what its outputs are."""
        self.sound = False
        """Whether `run` does all that the graph does: no input that wants a gradient is written to or returned."""

    def learn(self, compiled: Callable[..., Any], args: Sequence[Any]) -> Any:
        """Run it as ever, and look at its outputs."""
        wanting = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.requires_grad]
        plain = torch.is_grad_enabled() and all(type(arg) in (torch.Tensor, torch.nn.Parameter) for arg in wanting)
        before = [writes(arg) for arg in wanting] if plain else []
        outputs = compiled(*args)
        if isinstance(outputs, (list, tuple)) and torch.is_grad_enabled():
            found = {i: out for i, out in enumerate(outputs) if isinstance(out, torch.Tensor) and out.requires_grad}
            made = all(type(out) is torch.Tensor and not is_view(out) for out in found.values())
            returned = set(map(id, wanting)).intersection(map(id, found.values()))
            self.sound = plain and made and not returned and before == [writes(arg) for arg in wanting]
            self._wanting, self.seen = list(found), True
        return outputs

    def dead(self, args: Sequence[Any], params: Iterable[tuple[str, int]]) -> tuple[frozenset[int], bool]:
        """Positions of inputs through which no gradient needs to pass, and whether that is all that want one.

        params: (name, position) of those that are not asked about. Dynamo has a guard on what wants a gradient.
        """
        if self._asked is None:
            others = {position for _, position in params}
            wanting = (i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor) and arg.requires_grad)
            self._asked = tuple(i for i in wanting if i not in others)
        dead = frozenset(i for i in self._asked if leads_nowhere(args[i]))
        return dead, len(dead) == len(self._asked)

    def run(self, compiled: Callable[..., Any], args: Sequence[Any]) -> Any:
        """Run it with inputs that want no gradient: nothing is saved, and no backward will come here."""
        detached = [arg.detach() if isinstance(arg, torch.Tensor) and arg.requires_grad else arg for arg in args]
        outputs = list(compiled(*detached))
        for i, value in zip(self._wanting, _End.apply(_anchor(), [outputs[i] for i in self._wanting])):
            outputs[i] = value
        return outputs


def hooked(args: Sequence[Any], frozen: Iterable[int]) -> tuple[int, ...]:
    """Positions of frozen parameters that have hooks; none where nothing else is trained.

    torch would call these with the None that the parameters get, for which hooks are not made.
    """
    waiting = tuple(i for i in frozen if has_hooks(args[i]))
    rest = (arg for i, arg in enumerate(args) if i not in waiting) if waiting else ()
    return waiting if any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in rest) else ()


def without_hooks(compiled: Callable[..., Any], waiting: Iterable[int]) -> Callable[..., Any]:
    """The graph, as it runs with these inputs detached, as with requires_grad=False."""

    def run(*args: Any) -> Any:
        detached = list(args)
        for i in waiting:
            detached[i] = args[i].detach()
        return compiled(*detached)

    return run


def leads_nowhere(tensor: torch.Tensor) -> bool:
    """Whether all ways back from a tensor lead to frozen parameters or to where a backward ends; False if unsure.

    As with requires_grad=False, hooks on what lies between are not called. Nodes written in Python may hide parameters.
    """
    if tensor.grad_fn is None:
        return _is_frozen(tensor)
    if has_hooks(tensor):
        return False
    seen: set[Any] = set()
    waiting: list[Any] = [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction):
            if not getattr(node, "is_end", False):
                return False
            continue
        kind = type(node).__name__
        if kind == "AccumulateGrad":
            if not _is_frozen(node.variable):
                return False
        elif kind == "CppFunction" or len(seen) > FARTHEST:
            return False
        waiting += [following for following, _ in node.next_functions if following is not None]
    return True


def _is_frozen(tensor: Any) -> bool:
    state = registry.find(tensor)
    return state is not None and state.is_frozen
