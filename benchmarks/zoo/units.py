"""Is what groups claim true? With the slices of one set to zero, a model must do what it does without that unit.

The unit is taken out of a second copy by other means: hooks that set what it hands on to zero, at the module that reads
it (`down_proj`, `o_proj`, the expert's share), or where it is made if nothing in the group reads it.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from cacompile.explanation.groups import ExplainedGroup as Group
from cacompile.passes.plan import Slice

KINDS = ("neurons", "heads", "filters", "experts")
RTOL = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Of the largest output: what sums with and without zeros round differently."""

Span = tuple[nn.Module, int, int, int]
"""A module, the dimension of its input or output, start and stop."""


@dataclass
class Found:
    """What the groups of one kind turned out to be."""

    checked: int = 0
    exact: int = 0
    """Of those: removed by zeros as by other means, and seen in the output."""
    heard: int = 0
    """Of those: read by modules of which we know what they read."""
    silent: int = 0
    """Of those: without the slices that make the unit, its readers get zeros for it and otherwise what they got."""
    wrong: list[str] = field(default_factory=list)
    """What is not exact, by how much; what is not silent."""
    apart: dict[str, str] = field(default_factory=dict)
    """Not applicable: name -> why."""


def check_units(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], groups: Iterable[Group], every: bool = False
) -> dict[str, Found]:
    """Kind -> what was found, of the first and the last group of each family or of `every` one."""
    families: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        if group.kind in KINDS:
            families[group.family].append(group)
    run = Runs(model, args, kwargs)
    results: dict[str, Found] = defaultdict(Found)
    for members in families.values():
        for group in members if every else {g.name: g for g in (members[0], members[-1])}.values():
            _check(run, group, results[group.kind])
    return dict(results)


class Runs:
    """A copy of a model, in double precision where it can, to be run with slices set to zero or with hooks."""

    def __init__(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        try:
            self._take(model, args, kwargs, torch.float64)
        except RuntimeError:  # some products have no kernel for it
            self._take(model, args, kwargs, torch.float32)

    def _take(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], dtype: torch.dtype) -> None:
        self.rtol = RTOL[dtype]
        self.model = copy.deepcopy(model).to(dtype).eval()
        self._args, self._kwargs = tree_map(lambda v: v.to(dtype) if _is_real(v) else v, (tuple(args), dict(kwargs)))
        self.params = dict(self.model.named_parameters(remove_duplicate=False))
        self.plain = self()

    def __call__(self) -> list[Tensor]:
        with torch.no_grad():
            output = self.model(*self._args, **self._kwargs)
        return [leaf for leaf in tree_leaves(dict(output) if isinstance(output, dict) else output) if _is_real(leaf)]

    @contextlib.contextmanager
    def without(self, slices: Sequence[Slice]) -> Iterator[None]:
        """With these slices set to zero."""
        before = {piece.param: self.params[piece.param].detach().clone() for piece in slices}
        try:
            for piece in slices:
                self.params[piece.param].data.narrow(piece.dim, piece.start, piece.stop - piece.start).zero_()
            yield
        finally:
            for name, value in before.items():
                self.params[name].data.copy_(value)

    def owner(self, piece: Slice) -> tuple[nn.Module, str]:
        path, _, name = piece.param.rpartition(".")
        return self.model.get_submodule(path), name


def _is_real(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


Means = list[contextlib.AbstractContextManager[Any]]
"""By which a unit is taken out of a model as it runs."""
Called = list[Any]
"""What did so."""


def _check(run: Runs, group: Group, found: Found) -> None:
    read = [span for piece in group.slices if (span := reader(run, piece))]
    removed = _removed(run, group, read)
    if removed is None:
        found.apart[group.name] = "nothing that could be taken out reads or ends it"
        return
    with run.without(group.slices):
        zeroed = run()
    found.checked += 1
    seen, off = _distance(run.plain, removed), _distance(zeroed, removed)
    if off <= run.rtol and seen > 100 * off:
        found.exact += 1
    else:
        found.wrong.append(f"{group.name}: off by {off:.1e}, seen {seen:.1e}")
    if read and group.kind != "experts":
        found.heard += 1
        if heard := _heard(run, [piece for piece in group.slices if not reader(run, piece)], read):
            found.wrong.append(f"{group.name}: {heard}")
        else:
            found.silent += 1


def _removed(run: Runs, group: Group, read: Sequence[Span]) -> list[Tensor] | None:
    """What the model gives without the unit, by the first means that has an effect."""
    ways: tuple[Callable[[Called], Means], ...] = (
        lambda called: _at_experts(run, group, called) if group.kind == "experts" else [],
        lambda called: [m.register_forward_pre_hook(_zero_input(*span, called)) for m, *span in read],
        lambda called: [Einsums(run, group, called)],
        lambda called: [m.register_forward_hook(_zero_output(*span, called)) for m, *span in _last(run, group)],
    )
    for way in ways:
        called: Called = []
        with contextlib.ExitStack() as stack:
            for means in way(called):
                stack.enter_context(means)
            output = run()
        if called:
            return output
    return None


def _distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Of the largest entry."""
    pairs = list(zip(ours, theirs, strict=True))
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-300)) for a, b in pairs if b.numel())


def reader(run: Runs, piece: Slice) -> Span | None:
    """The module whose input has these indices of the parameter as a dimension, if it is one that multiplies."""
    module, name = run.owner(piece)
    if name != "weight":
        return None
    if isinstance(module, nn.Linear) and piece.dim == 1:
        return module, -1, piece.start, piece.stop
    if type(module).__name__ == "Conv1D" and piece.dim == 0:  # transformers' linear layer, [inputs, outputs]
        return module, -1, piece.start, piece.stop
    transposed = isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d))
    convolution = isinstance(module, (nn.Conv1d, nn.Conv2d)) or transposed
    if convolution and module.groups == 1 and piece.dim == int(not transposed):
        return module, 1, piece.start, piece.stop
    return None


def _last(run: Runs, group: Group) -> list[Span]:
    """The module after which a unit that nothing in the group reads is complete: its norm, else what makes it."""
    pieces = [(module, piece) for piece in group.slices for module, name in [run.owner(piece)] if name == "weight"]
    chosen = [pair for pair in pieces if "Norm" in type(pair[0]).__name__] or pieces
    if len({id(module) for module, _ in chosen}) != 1:
        return []
    images = isinstance(chosen[0][0], (nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm))
    return [(module, 1 if images else -1, piece.start, piece.stop) for module, piece in chosen]


class Einsums(TorchFunctionMode):
    """Where an einsum sums over a dimension of a parameter, what it multiplies these indices with is zero."""

    def __init__(self, run: Runs, group: Group, called: Called) -> None:
        super().__init__()
        self.pieces = {id(run.params[piece.param]): piece for piece in group.slices}
        self.called = called

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*(self._zeroed(*args) if func is torch.einsum else args), **(kwargs or {}))

    def _zeroed(self, equation: str, *operands: Tensor) -> tuple[Any, ...]:
        terms, result = equation.replace(" ", "").split("->")
        found = list(operands)
        for term, operand in zip(terms.split(","), operands, strict=True):
            piece = self.pieces.get(id(operand))
            if piece is None or (letter := term[piece.dim]) in result:
                continue
            for i, other in enumerate(terms.split(",")):
                if operands[i] is not operand and letter in other:
                    self.called.append(operand)
                    found[i] = _zeroed(found[i], other.index(letter), piece.start, piece.stop)
        return equation, *found


def _zero_input(dim: int, start: int, stop: int, called: Called) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        called.append(module)
        return _zeroed(args[0], dim, start, stop), *args[1:]

    return hook


def _zero_output(dim: int, start: int, stop: int, called: Called) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        called.append(module)
        return _zeroed(output, dim, start, stop)

    return hook


def _zeroed(value: Tensor, dim: int, start: int, stop: int) -> Tensor:
    value = value.clone()
    value.narrow(dim, start, stop - start).zero_()
    return value


def _at_experts(run: Runs, group: Group, called: Called) -> Means:
    """Transformers' experts: one module, to which the router gives each token's experts and their weights."""
    module = run.owner(group.slices[0])[0]
    if not {"top_k_index", "top_k_weights"} <= set(inspect.signature(module.forward).parameters):
        return []
    experts = torch.arange(group.slices[0].start, group.slices[0].stop)

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        called.append(module)
        hidden, index, weights = args
        return hidden, index, weights * ~torch.isin(index, experts)

    return [module.register_forward_pre_hook(hook)]


def _heard(run: Runs, makers: Sequence[Slice], read: Sequence[Span]) -> str:
    """Without what makes a unit, its readers should get zeros for it and else what they got; what is not so."""
    before = _inputs(run, read)
    with run.without(makers):
        after = _inputs(run, read)
    for (_, dim, start, stop), was, now in zip(read, before, after, strict=True):
        if now.narrow(dim, start, stop - start).any():
            return "its reader gets more than zeros for it"
        was, now = (_zeroed(value, dim, start, stop) for value in (was, now))
        if float((was - now).abs().max()) > run.rtol * float(was.abs().max()):
            return "its reader gets something else for others"
    return ""


def _inputs(run: Runs, read: Sequence[Span]) -> list[Tensor]:
    """What each of these modules reads when it is first called."""
    seen: dict[nn.Module, Tensor] = {}

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.setdefault(module, args[0].clone())

    with contextlib.ExitStack() as stack:
        for module in {module for module, *_ in read}:
            stack.enter_context(module.register_forward_pre_hook(look))
        run()
    return [seen[module] for module, *_ in read]
