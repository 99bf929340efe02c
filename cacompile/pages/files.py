"""Where reports are written: a path of the user's, checked, in folders that are made."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cacompile.errors import ConvAwareError, shown


def path_text(path: Any) -> str:
    """What a user gave for a path, as text. Raises ConvAwareError for what is none, and for an empty one."""
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str) or not text:
        raise ConvAwareError(f"path must be a path of type str or os.PathLike, got {shown(path)}")
    return text


def file_at(path: str | os.PathLike[str]) -> Path:
    """A file that may be written. Raises ConvAwareError where a folder is, or would be below a file."""
    place = Path(path_text(path))
    if place.is_dir():
        raise ConvAwareError(f"path must be a file's, got that of a folder: {shown(path)}")
    _make(place.parent, path)
    return place


def folder_at(path: str | os.PathLike[str]) -> Path:
    """A folder, made where there is none. Raises ConvAwareError where a file is, or would be below one."""
    _make(place := Path(path_text(path)), path)
    return place


def _make(folder: Path, path: Any) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConvAwareError(f"path must not lead through a file as if it were a folder, got {shown(path)}") from None
