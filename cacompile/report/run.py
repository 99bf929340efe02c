"""What a run did, from its saved state: as a page, as rows, for TensorBoard, or in the terminal."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cacompile.errors import ConvAwareError, unknown
from cacompile.pages.files import file_at, folder_at, path_text

from .data import RunData

SUFFIXES = {".html": "html", ".htm": "html", ".csv": "csv", ".txt": "terminal"}
FORMATS = ("html", "csv", "terminal", "tensorboard")


def report_state(state: Mapping[str, Any], path: str | os.PathLike[str] = "-", format: str | None = None) -> None:
    """Write what a run did; `Session.report` does the same for a run that is still in memory.

    state: of `Session.state_dict()`, as `torch.load` gives it back.
    path: `run.html` (a page that needs nothing else), `run.csv` (a row for each measurement and group), `run.txt`
    (tables as in the terminal), a folder (events for TensorBoard), or "-" to print tables.
    format: html, csv, terminal or tensorboard, where the path does not say it. Raises ConvAwareError for any other,
    for a path that says none, for a state of another kind, and if a library is missing.
    """
    format = _format(path, format)
    run = RunData.of(state)
    if format == "terminal":
        from .terminal import show

        if str(path) == "-":
            return show(run, sys.stdout)
        show(run, text := io.StringIO())
        file_at(path).write_text(text.getvalue(), encoding="utf-8")
        return None
    if str(path) == "-":
        raise ConvAwareError(f"a report of format {format!r} needs a path, got '-'")
    if format == "tensorboard":
        from .rows import write_events

        return write_events(run, folder_at(path))
    if format == "csv":
        from .rows import write_csv

        return write_csv(run, file_at(path))
    from .page import page

    file_at(path).write_text(page(run), encoding="utf-8")
    return None


def _format(path: str | os.PathLike[str], format: str | None) -> str:
    text = path_text(path)
    if format is not None:
        if format not in FORMATS:
            raise unknown("format of a report", format, FORMATS)
        return format
    if text == "-":
        return "terminal"
    if Path(text).is_dir() or text.endswith(("/", os.sep)):
        return "tensorboard"
    suffix = Path(text).suffix.lower()
    if suffix not in SUFFIXES:
        raise ConvAwareError(
            f"path must end in {', '.join(SUFFIXES)}, be a folder (tensorboard) or '-' (terminal), "
            f"or format be one of {', '.join(FORMATS)}; got {text!r}"
        )
    return SUFFIXES[suffix]
