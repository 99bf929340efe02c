"""Saved sessions, wherever loops put them: in a file of their own, in a checkpoint, or in a folder of those."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from cacompile.errors import ConvAwareError, shown
from cacompile.sessions.stateful import unpacked

SUFFIXES = (".pt", ".pth", ".ckpt", ".pkl")
"""Files of a folder that may hold a session: the Trainer's, plain loops', Lightning's and Accelerate's."""

KEYS = {"format", "history", "parameters"}
"""What every `Session.state_dict()` has, whatever its format."""

HOW = "save cacompile.session(model).state_dict(), alone or as a value of a checkpoint"


def find_state(place: Path) -> tuple[Path, Mapping[str, Any]]:
    """The session that a file or folder holds, and the file or folder that it was in.

    place: what `torch.save` wrote, of a session or of a mapping that has one somewhere; a folder of such files; a
    folder that `torch.distributed.checkpoint` wrote of a StatefulSession, whose index torch unpickles, so only folders
    that you trust; or a folder of such folders, of which the newest counts. Files are read without running code of
    theirs. Raises ConvAwareError that says what is there instead.
    """
    if place.is_file():
        return place, _one(place, _of_file(place))
    if not place.is_dir():
        raise ConvAwareError(f"no such file or folder: {place}")
    newest = sorted((each for each in place.iterdir() if each.is_dir()), key=lambda each: each.stat().st_mtime)
    for folder in (place, *reversed(newest)):
        if (found := _of_folder(folder)) is not None:
            return found
    raise ConvAwareError(
        f"{place} holds no session: no {', '.join(SUFFIXES)} in it, or in a folder of it, has one; {HOW}"
    )


def _of_folder(folder: Path) -> tuple[Path, Mapping[str, Any]] | None:
    if (folder / ".metadata").is_file():
        states = _distributed(folder)
        return None if not states else (folder, _one(folder, states))
    files = [file for file in sorted(folder.iterdir()) if file.suffix in SUFFIXES and file.is_file()]
    # the session's own file is small; what else is there may be gigabytes
    for file in sorted(files, key=lambda file: (file.name != "cacompile.pt", file.stat().st_size)):
        try:
            states = _of_file(file)
        except ConvAwareError:
            continue
        return file, _one(file, states)
    return None


def _of_file(file: Path) -> dict[str, Mapping[str, Any]]:
    """Where in the file -> session, one at least. Raises ConvAwareError that says what is there instead."""
    try:
        value = _load(file)
    except Exception as error:  # whatever torch.load makes of a file of another kind
        raise ConvAwareError(
            f"{file} cannot be read as what torch.save writes of plain values: {_unread(error)}; {HOW}"
        ) from None
    states = dict(_within(value))
    if not states:
        inside = f"a mapping with {shown(list(value)[:8])}" if isinstance(value, Mapping) else type(value).__name__
        raise ConvAwareError(f"{file} holds no session of cacompile: it is {inside}; {HOW}")
    return states


def _unread(error: Exception) -> str:
    """Why a file cannot be read. torch's own words advise to run the code in it, or are a number alone."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if named := re.search(r"(?:GLOBAL|Unsupported class) (\S+)", str(error)):
        return f"it holds an object of {named[1]}"
    return f"it is none, or not whole ({type(error).__name__})"


def _one(place: Path, states: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    if len(states) > 1:
        raise ConvAwareError(
            f"{place} holds {len(states)} sessions, at {', '.join(sorted(states))}: save one by itself"
        )
    return next(iter(states.values()))


def _load(file: Path) -> Any:
    """Tensors are mapped into memory where the file's format allows it, so that those of a model are never read."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, ValueError):  # an older format
        return torch.load(file, map_location="cpu", weights_only=True)


def _within(value: Any, where: str = "", depth: int = 4) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where, session) of all that a mapping holds, also as the bytes that a StatefulSession makes of one."""
    if not isinstance(value, Mapping):
        return
    if value.keys() >= KEYS:
        yield where, value
    elif isinstance(packed := value.get("state"), bytes):
        yield where, unpacked(packed)
    elif depth:
        for key, each in value.items():
            yield from _within(each, f"{where}.{key}".lstrip("."), depth - 1)


def _distributed(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Of `torch.distributed.checkpoint`: name -> session, of all values that a StatefulSession has packed."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    entries = checkpoint.FileSystemReader(folder).read_metadata().state_dict_metadata
    names = [name for name, kind in entries.items() if isinstance(kind, BytesStorageMetadata)]
    values: dict[str, Any] = {name: None for name in names if name.rpartition(".")[2] == "state"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as is meant here
        checkpoint.load(values, checkpoint_id=folder, no_dist=True)
    return {name: unpacked(value) for name, value in values.items() if isinstance(value, bytes)}
