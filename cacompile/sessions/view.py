"""A model as its session sees it: its parameters under our care by their names there, and their groups."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from cacompile.config import Config
from cacompile.state.binding import GraphBinding, bindings_of, bindings_with
from cacompile.state.groups import GroupIndex
from cacompile.state.params import ParamState
from cacompile.state.pins import hold_pins
from cacompile.state.registry import registry
from cacompile.state.table import newest_structure

from .pinning import Names, every_name


def named_parameters(model: torch.nn.Module, **settings: bool) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """As the module has them, without what torch.compile adds to the names; settings: as the module's own.

    A lazy module's come once they have a shape.
    """
    for name, param in model.named_parameters(**settings):
        if is_lazy(param):
            continue
        yield name.replace("_orig_mod.", ""), param


@dataclass(slots=True)
class _Looked:
    """What was found of a model's parameters."""

    trained: list[tuple[str, torch.nn.Parameter]]
    """As the module has them, each once."""
    names: Names
    params: dict[str, ParamState] | None = None
    """Their states, once all are tracked."""


class ModelView:
    """The states of one model's parameters, under the names that they have in that model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = weakref.ref(model)
        self._looked: _Looked | None = None
        """While one call looks; see `looking`."""
        self._indexed: tuple[Any, GroupIndex] | None = None
        """The groups, and of which structure of which states they are."""
        self._called: tuple[Any, tuple[list[str], list[str]]] | None = None
        """Their names, and of which structure of states of which names."""

    @property
    def params(self) -> dict[str, ParamState]:
        """Parameter name -> its state, for the parameters of the model that are under our care, in its order."""
        if self._looked is not None and self._looked.params is not None:
            return self._looked.params
        found = ((name, registry.find(param)) for name, param in self.trained())
        return {name: state for name, state in found if state is not None}

    @property
    def bindings(self) -> list[GraphBinding]:
        """The compiled graphs, with these parameters, that have run so far."""
        return bindings_of(self.params.values())

    @property
    def ran(self) -> list[GraphBinding]:
        """The same, also those of which nothing can be skipped."""
        return bindings_with(param for _, param in self.trained())

    @property
    def config(self) -> Config | None:
        """The options that the model was compiled with; None before its first forward pass."""
        return next((param.config for param in self.params.values() if param.blocks), None)

    @property
    def index(self) -> GroupIndex:
        """The groups, and which blocks of which parameters they are."""
        params = [param for param in self.params.values() if param.blocks]
        key = newest_structure(), params
        if self._indexed is None or self._indexed[0] != key:
            self._indexed = key, GroupIndex(params)
        return self._indexed[1]

    @property
    def groups(self) -> list[str]:
        """Names of all groups, in the order of `mask`: `layers.3.mlp.neurons[0:128]`."""
        return self.names()[1]

    @property
    def families(self) -> list[str]:
        """Names of all families of groups: `layers.3.mlp.neurons`."""
        return self.names()[0]

    def names(self) -> tuple[list[str], list[str]]:
        """(families', groups') names."""
        called = list(self.params.items())
        key = newest_structure(), called
        if self._called is None or self._called[0] != key:
            self._called = key, self.index.names({id(param): name for name, param in called})
        families, groups = self._called[1]
        return list(families), list(groups)

    @property
    def step_count(self) -> int:
        """Optimizer steps seen."""
        return max((param.step for param in self.params.values()), default=0)

    @property
    def model(self) -> torch.nn.Module | None:
        """The model, while it lives."""
        return self._model()

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Within it the model is looked through once, for nothing of the user's runs meanwhile."""
        before, model = self._looked, self._model()
        every = list(named_parameters(model, remove_duplicate=False)) if model is not None else []
        once = {id(param): (name, param) for name, param in reversed(every)}
        self._looked = _Looked(list(reversed(once.values())), every_name(every))
        try:
            yield
        finally:
            self._looked = before

    def trained(self) -> Iterable[tuple[str, torch.nn.Parameter]]:
        """(name, parameter) as the module has them, each once."""
        if self._looked is not None:
            return self._looked.trained
        model = self._model()
        return named_parameters(model) if model is not None else ()

    @property
    def _names(self) -> Names:
        if self._looked is not None:
            return self._looked.names
        model = self._model()
        return every_name(named_parameters(model, remove_duplicate=False) if model is not None else ())

    def _claim(self) -> dict[str, ParamState]:
        """`params`, after all that the model trains now have come under our care, and under its pin."""
        for name, param in self.trained():
            if param.requires_grad:
                registry.track(param, name)
        if self._looked is not None:
            self._looked.params = self.params
        hold_pins()
        return self.params
