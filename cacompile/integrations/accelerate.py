"""Accelerate: once this module is imported, its plugin takes "convaware" for the name of a Dynamo backend.

    import cacompile.integrations.accelerate

    accelerator = Accelerator(dynamo_plugin=TorchDynamoPlugin(backend="convaware", options={"tolerance": 0.1}))
    accelerator.register_for_checkpointing(cacompile.session(model))  # save_state and load_state carry it

Accelerate knows backends from a fixed list, so without this the name is refused, also in `ACCELERATE_DYNAMO_BACKEND`.
`accelerate launch --dynamo_backend` and `accelerate config` check it in a process where nothing of ours runs: leave it
out there. A model that is compiled before `prepare` needs none of this.
"""

from __future__ import annotations

from typing import Any

from .shared import BACKEND, missing

try:
    from accelerate.utils import DynamoBackend
except ImportError as error:
    raise missing("accelerate", error) from error


def admit_backend() -> None:
    """Let Accelerate's list of Dynamo backends find "convaware"; done by importing this module."""
    name = BACKEND.upper()
    if name in DynamoBackend:
        return
    member: Any = str.__new__(DynamoBackend, name)
    member._name_ = member._value_ = name
    before = DynamoBackend._missing_

    # what Enum asks for values that it does not know
    def find(cls: type, value: object) -> Any:
        return member if value == name else before(value)

    DynamoBackend._missing_ = classmethod(find)


admit_backend()
