"""Which layers are frozen in which step: each schedule is a pure function of the step, and `Follow` does what it says.

    schedule = RandomLayers([f"model.layers.{i}" for i in range(16)], live_layers=2, every=20)
    follow = Follow(model, schedule)
    for batch in loader:
        follow()                                # before each forward pass
        ...

Asked for a step, a schedule says the same in every process and after a resume: nothing but its fields decides.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from cacompile.config import LARGEST_SEED
from cacompile.errors import ConvAwareError, shown, unknown
from cacompile.names import find_params, prefixes
from cacompile.sessions.session import session
from cacompile.sessions.values import checked_step
from cacompile.sessions.view import named_parameters
from cacompile.state.draws import generator
from cacompile.state.frozen import newest_freeze
from cacompile.torch_internals import uncompiled

__all__ = ["BlockCyclic", "Follow", "FreezeOut", "GradualUnfreezing", "Layers", "RandomLayers", "Schedule"]

Layers = Sequence[str | Sequence[str]]
"""From the bottom up, each a name or pattern of parameters or modules, or several, as `session.freeze` takes them."""


@dataclass(frozen=True)
class Schedule(ABC):
    """Which of some layers are trained in which step; what is in none of them is left as it is."""

    layers: Layers

    def __post_init__(self) -> None:
        layers: Any = self.layers
        if isinstance(layers, str) or not isinstance(layers, Sequence) or not layers:
            raise self._wrong("layers", "a list of names and patterns, from the bottom up")
        layers = tuple((each,) if isinstance(each, str) else each for each in layers)
        for each in layers:
            if not isinstance(each, Sequence) or not each or not all(isinstance(name, str) for name in each):
                raise self._wrong("layers", "names, patterns, or lists of them")
        object.__setattr__(self, "layers", tuple(map(tuple, layers)))

    @abstractmethod
    def live(self, step: int) -> frozenset[int]:
        """Numbers of the layers that are trained in the step that follows on `step` optimizer steps."""

    def frozen(self, step: int) -> tuple[str, ...]:
        """Names and patterns of all other layers."""
        live = self.live(step)
        return tuple(name for i, names in enumerate(self.layers) if i not in live for name in names)

    def to_dict(self) -> dict[str, Any]:
        """Kind and fields, of types that JSON knows."""
        return {"kind": type(self).__name__, **asdict(self), "layers": list(map(list, self.layers))}

    @staticmethod
    def of(saved: Mapping[str, Any]) -> Schedule:
        """From `to_dict`. Raises ConvAwareError for a kind that is none of this module's, and for wrong fields."""
        if not isinstance(saved, Mapping):
            raise ConvAwareError(f"a schedule must be one of {', '.join(KINDS)}, or its to_dict(), got {shown(saved)}")
        fields = dict(saved)
        kind = fields.pop("kind", None)
        if not isinstance(kind, str) or kind not in KINDS:
            raise unknown("kind of schedule:", kind, KINDS)
        try:
            return KINDS[kind](**fields)
        except TypeError as error:
            raise ConvAwareError(f"{kind} cannot be made of {shown(saved)}: {error}") from None

    def _whole(self, field: str, low: int, high: int | None = None) -> None:
        """Raise unless a field is a whole number of this range."""
        value = getattr(self, field)
        fits = isinstance(value, int) and not isinstance(value, bool)
        if not fits or value < low or (high is not None and value > high):
            span = f">= {low}" if high is None else f"between {low} and {high}"
            raise self._wrong(field, f"an int {span}")

    def _bool(self, field: str) -> None:
        if not isinstance(getattr(self, field), bool):
            raise self._wrong(field, "a bool")

    def _wrong(self, field: str, allowed: str) -> ConvAwareError:
        return ConvAwareError(
            f"{type(self).__name__}({field}=...) must be {allowed}, got {shown(getattr(self, field))}"
        )


@dataclass(frozen=True)
class GradualUnfreezing(Schedule):
    """The top layer first, then one more below it every few steps, until all are trained (Howard and Ruder 2018)."""

    every: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self._whole("every", 1)

    def live(self, step: int) -> frozenset[int]:
        return frozenset(range(len(self.layers))[-(1 + step // self.every) :])


@dataclass(frozen=True)
class FreezeOut(Schedule):
    """From the bottom up layers are frozen for good, after Brock et al. 2017; the top one never is.

    steps: of the whole run. first: the share of them after which the lowest layer is frozen, 0 to 1; those between it
    and the top follow at equal distances. cubed: all of these shares to the third power.
    There, a layer's learning rate is annealed to zero by then; freezing works without, and `rate` has the factor.
    """

    steps: int
    first: float = 0.5
    cubed: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._whole("steps", 1)
        self._bool("cubed")
        if isinstance(self.first, bool) or not isinstance(self.first, (int, float)) or not 0.0 <= self.first <= 1.0:
            raise self._wrong("first", "a number between 0 and 1")

    def ends(self, layer: int) -> float:
        """The share of the run in which a layer is trained."""
        share = self.first + (1.0 - self.first) * layer / max(1, len(self.layers) - 1)
        return share**3 if self.cubed else share

    def rate(self, layer: int, step: int) -> float:
        """What a layer's learning rate is multiplied by, 1 to 0: for `LambdaLR`, with one parameter group a layer."""
        end = self.ends(layer) * self.steps
        return 0.5 * (1.0 + math.cos(math.pi * step / end)) if step < end else 0.0

    def live(self, step: int) -> frozenset[int]:
        top = len(self.layers) - 1
        return frozenset(i for i in range(top + 1) if i == top or step < self.ends(i) * self.steps)


@dataclass(frozen=True)
class RandomLayers(Schedule):
    """Some layers, drawn anew every few steps: LISA (Pan et al. 2024), where embedding and head are none of `layers`.

    live_layers: how many are trained at a time. every: steps between two draws. seed: of the draws, 0 to 2**64 - 1.
    """

    live_layers: int = 2
    every: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._whole("live_layers", 1, len(self.layers))
        self._whole("every", 1)
        self._whole("seed", 0, LARGEST_SEED)

    def live(self, step: int) -> frozenset[int]:
        order = np.argsort(generator(self.seed, step // self.every).random(len(self.layers)))
        return frozenset(order[: self.live_layers].tolist())


@dataclass(frozen=True)
class BlockCyclic(Schedule):
    """One layer after the other, from the top down and then from the top again, as BAdam (Luo et al. 2024) does.

    every: steps for each. upwards: from the bottom up. BAdam begins each turn with an empty optimizer state; here a
    layer goes on with the one it had.
    """

    every: int
    upwards: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._whole("every", 1)
        self._bool("upwards")

    def live(self, step: int) -> frozenset[int]:
        turn = step // self.every % len(self.layers)
        return frozenset([turn if self.upwards else len(self.layers) - 1 - turn])


KINDS: dict[str, Any] = {kind.__name__: kind for kind in (GradualUnfreezing, FreezeOut, RandomLayers, BlockCyclic)}


class Follow:
    """Freezes and thaws a model's layers as a schedule says, whatever froze or thawed these before.

    Raises ConvAwareError, before anything is changed, for what is no schedule, for a pattern that no parameter or
    module is called by, and for a step that is none.
    """

    def __init__(self, model: torch.nn.Module, schedule: Schedule) -> None:
        if not isinstance(schedule, Schedule):
            raise ConvAwareError(f"schedule must be a Schedule, such as {', '.join(KINDS)}, got {shown(schedule)}")
        self.session, self.schedule = session(model), schedule
        self._done: tuple[tuple[str, ...], int] | None = None
        """What was frozen last, and when; another may have thawed or frozen something since, as a loaded state does."""
        names = [name for name, _ in named_parameters(uncompiled(model), remove_duplicate=False)]
        for pattern in (pattern for layer in schedule.layers for pattern in layer):
            if not find_params(pattern, names):
                raise unknown("parameter or module:", pattern, {part for name in names for part in prefixes(name)})

    def __call__(self, step: int | None = None) -> None:
        """Call before the first forward pass of each step; again does nothing, unless something else was frozen since.

        step: optimizer steps that have been done; None: those that the session has seen.
        """
        step = self.session.step_count if step is None else checked_step(step)
        frozen = self.schedule.frozen(step)
        if (frozen, newest_freeze()) == self._done:
            return
        live = [pattern for layer in self.schedule.layers for pattern in layer if pattern not in frozen]
        if live:
            self.session.thaw(*live)
        if frozen:
            self.session.freeze(*frozen)
        self._done = frozen, newest_freeze()
