"""Hugging Face's Trainer: compiles its model with convaware, logs what is skipped, saves and resumes exactly.

    trainer = Trainer(model, args, callbacks=[ConvAwareCallback({"tolerance": 0.1})], ...)

`TrainingArguments(torch_compile=True, torch_compile_backend="convaware")` works as well once this module is imported;
then Accelerate compiles, and the callback only adds its options, logs and checkpoints.
`FreezingCallback(schedule)` freezes and thaws layers.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cacompile.errors import ConvAwareError
from cacompile.schedules import Follow, Schedule
from cacompile.sessions.session import session
from cacompile.settings import settings

from .shared import BACKEND, Reporter, missing

try:
    from transformers import TrainerCallback
    from transformers.trainer_callback import CallbackHandler, ExportableState
except ImportError as error:
    raise missing("transformers", error) from error

from cacompile.integrations import accelerate as accelerate  # so that torch_compile_backend="convaware" is taken
from cacompile.torch_internals import is_compiled

log = logging.getLogger(__name__)

FILE = "cacompile.pt"
"""In every checkpoint: the session's `state_dict`, for `torch.load`."""

STATE = "trainer_state.json"
"""The Trainer's own, which tells checkpoints apart."""


class ConvAwareCallback(TrainerCallback):
    """Trains the Trainer's model with convaware.

    options: as for `torch.compile`, ours and Inductor's. Where TrainingArguments ask for no compiling, the model is
    compiled in place when training begins, unless it is compiled already; where they ask for this backend, Accelerate
    compiles it with these options. Raises ConvAwareError where they ask for another one.

    Every log of the training loss gets `convaware/...` (`cacompile.status(model).to_dict()`), every checkpoint a
    `cacompile.pt`, and the session's report the loss. Resumed
    training continues from it bit for bit. The Trainer does not tell its callbacks where it resumes from, so it is
    looked for in `args.resume_from_checkpoint` and `args.output_dir`: if you resume from a folder elsewhere, set the
    former too, besides giving it to `trainer.train`.
    """

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        settings(options)  # mistakes show up here, not when training begins
        self.options = dict(options or {})
        self._handed_on = False
        self._reporter = Reporter()

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if _asked_for(args) and self.options:
            from accelerate.state import AcceleratorState

            AcceleratorState().dynamo_plugin.options = self.options
            self._handed_on = True
        elif self.options and model is not None and is_compiled(model):
            raise self._too_late()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._stand_first(sys._getframe(1).f_locals.get("self"))
        if _asked_for(args):
            if self.options and not self._handed_on:
                raise ConvAwareError(
                    "options of a ConvAwareCallback that comes late are lost; give it to Trainer(callbacks=)"
                )
        elif not is_compiled(model):
            model.compile(backend=BACKEND, options=self.options)
        elif self.options and not self._handed_on:
            raise self._too_late()
        self._handed_on = True
        if state.global_step:
            _resume(args, state, model)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        found = self._reporter.numbers(model)
        logs.update(found)
        if found and isinstance(logs["loss"], (int, float)):
            session(model).note_loss(logs["loss"])
        # the Trainer has put a copy of `logs` in here already
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(found)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and not args.save_only_model and folder.is_dir() and session(model).bindings:
            torch.save(session(model).state_dict(), folder / FILE)

    def _too_late(self) -> ConvAwareError:
        return ConvAwareError(
            f"options {self.options!r} of ConvAwareCallback come too late: the model is compiled already; "
            "give them to torch.compile, or leave compiling to the callback"
        )

    def _stand_first(self, handler: Any) -> None:
        """Before those who send logs to TensorBoard and the like: Trainer puts its own callbacks first.

        handler: whoever calls callbacks; a callback is not told, so its caller's frame is asked.
        """
        if isinstance(handler, CallbackHandler) and handler.callbacks[:1] != [self] and self in handler.callbacks:
            handler.callbacks = [self, *(each for each in handler.callbacks if each is not self)]


class FreezingCallback(TrainerCallback, ExportableState):
    """Freezes and thaws layers as a schedule says, before each optimizer step's first batch, by the Trainer's steps.

    schedule: one of `cacompile.schedules`, or its `to_dict`. Beside a ConvAwareCallback, or a model that is compiled.
    What is saved with `TrainerState` is the schedule, which `restore_callback_states_from_checkpoint` brings back.
    """

    def __init__(self, schedule: Schedule | Mapping[str, Any]) -> None:
        self.schedule = schedule if isinstance(schedule, Schedule) else Schedule.of(schedule)
        self._follow: Follow | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._follow = Follow(model, self.schedule)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._follow is not None:
            self._follow(state.global_step)

    def state(self) -> dict[str, Any]:
        return {"args": {"schedule": self.schedule.to_dict()}, "attributes": {}}


def _asked_for(args: Any) -> bool:
    """Whether TrainingArguments have Accelerate compile the model with us; an error if with another backend."""
    if args.torch_compile and args.torch_compile_backend != BACKEND:
        raise ConvAwareError(
            f"torch_compile_backend must be {BACKEND!r} with ConvAwareCallback, got {args.torch_compile_backend!r}; "
            "without torch_compile the callback compiles the model"
        )
    return bool(args.torch_compile)


def _resume(args: Any, state: Any, model: Any) -> None:
    given = args.resume_from_checkpoint
    places = [Path(args.output_dir) / f"checkpoint-{state.global_step}"]
    if isinstance(given, str) and Path(given).is_dir():
        places.insert(0, Path(given))
    for folder in places:
        if _is_of(folder, state):
            if (folder / FILE).is_file():
                session(model).load_state_dict(torch.load(folder / FILE, weights_only=True))
            else:
                log.warning("%s has no %s, so the groups of this run start anew", folder, FILE)
            return
    tried = " and ".join(map(str, places))
    log.warning(
        "the checkpoint of step %d that this run resumes from is not in %s: its groups start anew. "
        "Set TrainingArguments(resume_from_checkpoint=...) to its folder",
        state.global_step,
        tried,
    )


def _is_of(folder: Path, state: Any) -> bool:
    """Whether the state that was resumed is that of this checkpoint."""
    try:
        saved = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    same = saved.get("global_step") == state.global_step
    # as text, because a loss may be NaN
    return same and json.dumps(saved.get("log_history")) == json.dumps(state.log_history)
