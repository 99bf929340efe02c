"""Lightning: logs what is skipped, and puts the session into Lightning's own checkpoints.

    trainer = Trainer(callbacks=[ConvAwareCallback()], ...)

Compile in the LightningModule, in place, so that names in checkpoints stay as they are:

    def configure_model(self):
        self.net.compile(backend="convaware", options={"tolerance": 0.1})

One class for both packages, `lightning` and `pytorch_lightning`.
"""

from __future__ import annotations

import importlib
import weakref
from typing import Any

from cacompile.sessions.session import session

from .shared import missing, numbers


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
    """Logs `convaware/...` (`shared.numbers`) every `log_every_n_steps`; its state is the session's.

    A run that continues from a checkpoint of Lightning (`trainer.fit(..., ckpt_path=...)`) continues bit for bit where
    Lightning itself does: within an epoch, a loader without a state of its own begins its data anew.
    """

    def __init__(self) -> None:
        self._module: weakref.ref[Any] | None = None
        self._waiting: dict[str, Any] | None = None

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
            pl_module.log_dict(numbers(pl_module))

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
