"""An agreement: what all ranks of a process group do alike with the parameters that one optimizer steps.

Rank 0 decides, at each reading; all ranks, rank 0 too, take its decision over at the end of the next step. In between
masks follow from it and from the number of the step alone, see `agreed`. Readings are counted by the optimizer's steps.

    rank 0     step k * monitor_every: measures, decides with what others have told at earlier readings, says so
    others     the same step: tell what they know (blocks, FLOPs; scores of parameters that they alone step)
    all        the step after: take it over. Rank 0 has said it before it entered the backward of this step

A rank waits for rank 0 only for readings that rank 0 is known to come to, and rank 0 waits for nobody: it decides
nothing on parameters that some rank has not told of. Ranks may come to it at different times, or never.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

from torch.optim import Optimizer

from cacompile.state.channel import Channel
from cacompile.state.params import ParamState
from cacompile.state.replicas import Replicas, can_agree
from cacompile.torch_internals import is_zero1, warning_once

from .controller import capturing
from .copies import KEPT, Copies
from .decider import Parts, flops_told
from .divergence import about, compare, compare_states
from .following import Following
from .readings import Readings, own_of
from .saved import resumed

log = logging.getLogger(__name__)

PATIENCE = 10
"""Readings at which something should have been decided."""

AS_IT_IS: dict[str, Any] = {"parts": None}
"""Decided by a rank that has run out of batches."""


class Agreement:
    """The agreement of one optimizer, as one rank sees it."""

    def __init__(self, replicas: Replicas, members: Sequence[ParamState]) -> None:
        self.replicas = replicas
        self.members = list(members)
        name = str(members[0].place)
        self._channel = Channel(replicas.store, f"{name}.{replicas.names[name]}", replicas.rank, replicas.size)
        replicas.names[name] += 1
        replicas.agreements.add(self)
        self._clock = self._shift = self._ahead = 0
        """Steps that the optimizer has done, and how many of them this rank was not there for; forward passes of others
        since this rank has joined."""
        self._epoch = 0
        """Ends of `Join` so far."""
        self._every: int | None = None
        """Steps between two readings; None until rank 0 has said so."""
        self._from = 0
        """The first step whose decision this rank reads."""
        self._due: int | None = None
        """The reading whose decision is taken over next."""
        self._said: dict[int, dict[str, Any]] = {}
        self._digests: dict[int, dict[str, int]] = {}
        self._told: list[dict[str, Any]] | None = None
        self._readings = Readings()
        self._copies = Copies(replicas)
        self._following = Following(self.members)
        self._grown = -1  # the step after which the optimizer got other parameters; what was told before is of the old
        self._loaded: tuple[int, list[dict[str, Any]]] | None = None
        """When a state was loaded, and what other ranks had told last in it; until they tell anew."""

    @property
    def step(self) -> int:
        return self._following.step

    @property
    def _leads(self) -> bool:
        return self.replicas.rank == 0

    def take_members(self, members: Sequence[ParamState]) -> None:
        """These are what the optimizer steps from now on."""
        if list(members) != self.members:
            self._grown = self._clock
        self.members = self._following.members = list(members)

    def look(self, optimizer: Optimizer | None, count: int) -> None:
        """A step begins: see where the weights are, if it is to be measured here. count: of those that are done."""
        self._readings.skip()
        self._resume(count)
        if self._every is None or (self.step + 1) % self._every or capturing():
            return
        params = [param for param in self.members if param.blocks]
        if self._leads:
            self._told = self._newest_told()
            params = [param for param in params if self._known_to_all(param)]
        elif is_zero1(optimizer):
            own = own_of(optimizer) or set()
            params = [param for param in params if id(param.param) in own]
        else:
            params = [param for param in params if param.shard is not None]
        self._readings.look(params)

    def advance(self, optimizer: Optimizer | None, count: int) -> None:
        """A step is done, the count-th of this optimizer in this process."""
        if capturing() or not can_agree():
            return
        self._resume(count - 1)
        self._clock, self._ahead = count + self._shift, 0
        self._following.end_step()
        if self._due is not None:
            self._take_over(self._due)
        if self._every is None:
            self._begin()
        elif self._is_reading(self.step) and self._clock >= self._from:
            self._read(optimizer)
        self._following.draw()

    def joined(self) -> None:
        """This rank has no more batches, and the others go forward once more: nobody decides, so all stays as it is."""
        self._ahead += 1
        clock = self._clock + self._ahead
        if self._leads and self._every is not None and self._is_reading(self.step + self._ahead):
            self._say(clock, AS_IT_IS)

    def together(self, last: bool) -> None:
        """All ranks have joined, and go on with what those have that joined last."""
        if not can_agree():
            return
        if last:
            mine = {"every": self._every, "steps": self._following.steps, "parts": self._following.to_list()}
            self._channel.leave(self._epoch, {"clock": self._clock, **mine})
        else:
            state = self._channel.joined(self._epoch)
            self._shift += state["clock"] - self._clock
            self._clock = state["clock"]
            self._following.set_steps(state["steps"])
            if self._every is not None:  # else it has yet to say that it follows
                self._following.resume(state["parts"])
        self._epoch += 1
        self._due, self._ahead = None, 0
        self._digests.clear()
        self._copies.forget()
        self._said.clear()

    def _is_reading(self, step: int) -> bool:
        return self._every is not None and step % self._every == 0

    def _begin(self) -> None:
        """Rank 0 says that it is there, once it knows how often to read; the others look whether it has, and tell."""
        if self._leads:
            parted = next((param for param in self.members if param.blocks), None)
            if parted is not None:
                self._every, self._from = parted.config.monitor_every, self._clock + 1
                self._greet()
            return
        said = self._channel.hello()
        if said is not None and said["clock"] < self._clock:  # it is surely there by then, on every run
            compare(self._about(), said, self.replicas.rank, 0)
            self._every, self._epoch = said["every"], max(self._epoch, said["epoch"])
            self._from = self._clock + 1
            passed = self._clock - said["clock"]
            self._following.set_steps({place: step + passed for place, step in said["steps"].items()})
        self._tell()

    def _greet(self) -> None:
        hello = {"every": self._every, "clock": self._clock, "steps": self._following.steps, **self._about()}
        self._channel.greet({**hello, "epoch": self._epoch})

    def _newest_told(self) -> list[dict[str, Any]] | None:
        """What other ranks have told last, each of them before this step."""
        told = self._channel.told(self._clock + 1)
        if self._loaded is not None and (told is None or min(known["clock"] for known in told) <= self._loaded[0]):
            about = self._about()
            return [{**about, **known} for known in self._loaded[1]]
        self._loaded = None
        return told

    def save(self) -> dict[str, Any] | None:
        """All that later masks depend on, with places of parameters; None before anything is agreed on.

        Right after a reading it waits for what is on its way: the decision, or on rank 0 what others tell.
        """
        if self._every is None:
            return None
        told = None
        if self._leads:
            told = self._newest_told()
            if self._due is not None and told is not None:
                told = self._channel.told_at(self._clock) or told
        elif self._due is not None and self._due not in self._said:
            self._said[self._due] = self._channel.decision(self._epoch, self._due)
        return {
            "every": self._every,
            "parts": self._following.to_list(),
            "said": None if self._due is None else self._said[self._due]["parts"],
            "told": told,
            "shards": self._readings.shards,
        }

    def _resume(self, count: int) -> None:
        """Go on from a state that was loaded since the last step, on all ranks. count: steps done by then."""
        found = next((param.resumed for param in self.members if param.resumed is not None), None)
        if found is None:
            return
        for param in found.params.values():
            param.resumed = None if param.resumed is found else param.resumed
        if not found.fits:
            return
        saved = resumed(found.saved, {name: param.place for name, param in found.params.items()})
        clock = self._clock = count + self._shift
        self._every, self._from, self._due = saved["every"], clock + 1, None
        self._digests.clear()
        self._copies.forget()
        self._said.clear()
        if saved["said"] is not None:
            self._due, self._said[clock] = clock, {"parts": saved["said"], "step": self.step, "digest": None}
        self._following.resume(saved["parts"])
        if self._leads:
            self._readings.resume(clock, saved["shards"])
            told = [{**known, "clock": clock, "follows": 0, "digest": None} for known in saved["told"] or ()]
            self._loaded = clock, told
            self._greet()

    def _read(self, optimizer: Optimizer | None) -> None:
        self._due = self._clock
        self._digests = dict([*self._digests.items(), (self._clock, self._following.digest())][-KEPT:])
        self._copies.look(self.members, self._clock, self._every or 1)
        if not self._leads:
            self._tell(*self._readings.measure(optimizer))
        elif self._clock not in self._said:
            self._decide(optimizer)

    def _decide(self, optimizer: Optimizer | None) -> None:
        told, ours = self._told or [], self._about()
        for rank, known in enumerate(told, start=1):
            compare(ours | {"grows": ours["grows"] or known["clock"] <= self._grown}, known, 0, rank)
            if known["clock"] in self._digests and known["digest"] is not None:
                compare_states(self._digests[known["clock"]], known["digest"], 0, rank)
            self._copies.compare(self.members, known.get("weights"), rank)
        parts = [each.to_dict() for each in self._readings.decide(optimizer, told, self._clock)]
        if self._readings.fruitless == PATIENCE:
            warning_once(
                log,
                "%d readings of %s and more, and not all ranks have met them in a compiled graph and an optimizer that "
                "steps the same parameters: until they have, all compute everything",
                PATIENCE,
                self.members[0].name,
            )
        said = {"parts": parts, "step": self.step, "digest": self._digests[self._clock], **ours}
        self._say(self._clock, said)
        self._channel.clear(min((known["clock"] for known in told), default=0))

    def _say(self, clock: int, decision: dict[str, Any]) -> None:
        if clock not in self._said:
            self._said[clock] = decision
            self._channel.decide(self._epoch, clock, decision)

    def _tell(self, scores: dict[int, Any] | None = None, parts: Parts | None = None) -> None:
        known: dict[str, Any] = {
            "clock": self._clock,
            "follows": self._from if self._every is not None else None,
            "blocks": {param.place: astuple(param.partition) for param in self.members if param.partition},
            "flops": flops_told(self.members),
            "scores": scores or {},
            "parts": parts or {},
            "digest": self._digests.get(self._clock),
            "weights": self._copies.told(self._clock),
        }
        self._channel.tell({**known, **self._about()})

    def _known_to_all(self, param: ParamState) -> bool:
        """Whether all ranks have parted it as it is here, and read what is decided next."""
        assert param.partition is not None
        mine = astuple(param.partition)
        return self._told is not None and all(
            known["blocks"].get(param.place) == mine
            and known["follows"] is not None
            and known["follows"] <= self._clock + 1
            for known in self._told
        )

    def _take_over(self, clock: int) -> None:
        self._due = None
        said = self._said.pop(clock, None)
        if said is None and not self._leads:
            said = self._channel.decision(self._epoch, clock)
        if said is None or said["parts"] is None:
            return
        if not self._leads and clock in self._digests and said["digest"] is not None:
            compare(self._about(), said, self.replicas.rank, 0)
            compare_states(self._digests[clock], said["digest"], self.replicas.rank, 0)
        if said["step"] + 1 == self.step:  # else a state was loaded in between, on all ranks
            self._following.take_over(said["parts"])

    def _about(self) -> dict[str, Any]:
        return about(self.members, grows=bool(self.replicas.places))
