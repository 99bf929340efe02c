"""Lightning: logs what is skipped, and puts the session into Lightning's own checkpoints.

    trainer = Trainer(callbacks=[ConvAwareCallback()], ...)

Compile in the LightningModule, in place, so that names in checkpoints stay as they are:

    def configure_model(self):
        self.net.compile(backend="convaware", options={"tolerance": 0.1})

`FreezingCallback(schedule)` freezes and thaws layers. One class each for both packages, `lightning` and
`pytorch_lightning`.
"""

from __future__ import annotations

import importlib
import logging
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from cacompile.schedules import Follow, Schedule
from cacompile.sessions.session import session

from .shared import Reporter, missing

log = logging.getLogger(__name__)


def _bases() -> tuple[type, ...]:
    """The Callback of each of the two packages that is there: neither takes the other's for its own."""
    found: list[type] = []
    for package in ("lightning.pytorch", "pytorch_lightning"):
        try:
            found.append(importlib.import_module(f"{package}.callbacks").Callback)
        except ImportError as error:
            absent = error
    if not found:
        raise missing("lightning", absent) from absent
    return tuple(dict.fromkeys(found))


_Callback: Any = type("_Callback", _bases(), {})


class ConvAwareCallback(_Callback):
    """Logs `convaware/...` (`cacompile.status(model).to_dict()`) every `log_every_n_steps`; its state is the session's.

    The progress bar shows `saved`, the share of the steps' FLOPs that was left out so far. A loss that the training
    step returns is kept for the session's report.

    A run that continues from a checkpoint of Lightning (`trainer.fit(..., ckpt_path=...)`) continues bit for bit where
    Lightning itself does: within an epoch, a loader without a state of its own begins its data anew.
    """

    def __init__(self) -> None:
        self._module: weakref.ref[Any] | None = None
        self._waiting: dict[str, Any] | None = None
        self._reporter = Reporter()

    @property
    def state_key(self) -> str:
        """Where the session is in `checkpoint["callbacks"]`."""
        return "cacompile"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._module = weakref.ref(pl_module)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if self._waiting is not None:
            state, self._waiting = self._waiting, None
            session(pl_module).load_state_dict(state)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer._logger_connector.should_update_logs:  # as Lightning's own callbacks ask
            found = self._reporter.numbers(pl_module)
            pl_module.log_dict(found)
            if found:
                pl_module.log("saved", found["convaware/saved_step"], prog_bar=True, logger=False)
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            if isinstance(loss, torch.Tensor) and loss.numel() == 1:
                session(pl_module).note_loss(float(loss))

    def state_dict(self) -> dict[str, Any]:
        """The session's state; empty before `setup`."""
        module = None if self._module is None else self._module()
        return self._waiting or ({} if module is None else session(module).state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Taken over at once, or when training begins if there is no module yet; errors are the session's."""
        module = None if self._module is None else self._module()
        if module is None:
            self._waiting = state_dict
        elif state_dict:
            session(module).load_state_dict(state_dict)


class FreezingCallback(_Callback):
    """Freezes and thaws layers as a schedule says, before each optimizer step's first batch, by the Trainer's steps.

    schedule: one of `cacompile.schedules`, or its `to_dict`. It is saved in checkpoints; a run that continues follows
    the saved one, and the log says so if it is another. `trainer.global_step` counts the steps of all optimizers.
    """

    def __init__(self, schedule: Schedule | Mapping[str, Any]) -> None:
        self.schedule = schedule if isinstance(schedule, Schedule) else Schedule.of(schedule)
        self._follow: Follow | None = None

    @property
    def state_key(self) -> str:
        """Where the schedule is in `checkpoint["callbacks"]`."""
        return "cacompile.schedule"

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._follow is None or self._follow.schedule is not self.schedule:
            self._follow = Follow(pl_module, self.schedule)
        self._follow(trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        return self.schedule.to_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Follow the saved schedule. Raises ConvAwareError for one that cannot be made."""
        if state_dict != self.schedule.to_dict():
            log.warning("this run continues with the saved schedule %s instead of %s", state_dict, self.schedule)
            self.schedule = Schedule.of(state_dict)
