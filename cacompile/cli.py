"""The command line: what can be skipped in a model, what a run has skipped, and whether this machine is fit."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .errors import ConvAwareError
from .version import VERSION

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
FORMATS = (".html", ".svg", ".json")
WIDE = 1000
"""Columns of what is piped: a table is as wide as what is in it, and no line is broken."""

_COLORS = {"ok": "green", "note": "yellow", "fails": "red"}


def _console() -> Console:
    console = Console()  # here, because a test or a shell may have replaced stdout
    return console if console.is_terminal else Console(width=WIDE)


def _fail(message: object) -> typer.Exit:
    """To be raised; 2 is the code for what a user gave."""
    typer.echo(f"error: {message}", err=True)
    return typer.Exit(2)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cacompile {VERSION}")
        raise typer.Exit()


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="tell the version and stop")
    ] = False,
) -> None:
    """Training stops paying for what has converged."""


@app.command()
def explain(
    target: Annotated[str, typer.Argument(help="module:factory or file.py:factory, called without arguments")],
    out: Annotated[Path | None, typer.Option(help="write .html, .svg or .json as well")] = None,
    block_rows: Annotated[int | None, typer.Option(help="rows of a weight in one group, about")] = None,
) -> None:
    """Show what would be skipped in a model, by groups, and why the rest stays dense.

    The factory returns (model, example_inputs), where example_inputs is a tuple or list of arguments, a dict of keyword
    arguments, or one argument; or a model alone, if it has already run with backend="convaware".
    """
    if out is not None and out.suffix not in FORMATS:
        raise _fail(f"--out must end in {', '.join(FORMATS)}, got {str(out)!r}")
    from cacompile.explanation.explain import explain as explain_model
    from cacompile.explanation.tables import parameters

    model, args, kwargs = _model_of(target)
    options = None if block_rows is None else {"block_rows": block_rows}
    try:
        found = explain_model(model, *args, options=options, **kwargs)
    except ConvAwareError as error:
        raise _fail(error) from None
    _console().print(parameters(found))
    for line in found.summary:
        _console().print(escape(line), highlight=False)
    if out is not None:
        if out.suffix == ".json":
            found.to_json(out)
        else:
            (found.to_html if out.suffix == ".html" else found.to_svg)(out)
        typer.echo(f"written: {out}")


def _model_of(target: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """(model, arguments, keyword arguments) that a factory returns."""
    factory = _factory(target)
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise _fail(f"{target} must be callable without arguments: {error}") from None
    except ValueError:  # it has no signature, as some of C have none
        pass
    made = factory()
    if not isinstance(made, (tuple, list)):
        return made, (), {}
    if len(made) != 2:
        raise _fail(f"{target} must return model or (model, example_inputs), got {len(made)} values")
    model, inputs = made
    if isinstance(inputs, Mapping):
        return model, (), dict(inputs)
    return model, tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}


def _factory(target: str) -> Any:
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise _fail(f"expected module:factory or file.py:factory, got {target!r}")
    sys.path.insert(0, str(Path.cwd()))  # as for python -m
    try:
        module = _load(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise _fail(f"{target}: {error}") from None
    try:
        found: Any = module
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise _fail(f"{target}: {error}") from None
    if not callable(found):
        raise _fail(f"{target} must be callable, got {type(found).__name__}")
    return found


def _load(file: Path) -> Any:
    if not file.exists():
        raise FileNotFoundError(f"no such file: {file}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@app.command()
def report(
    state: Annotated[
        Path,
        typer.Argument(help="a saved session, a checkpoint that has one, or a folder of a Trainer, of DCP, of files"),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="run.html, run.csv, run.txt or a folder for TensorBoard; by default it is printed"),
    ] = None,
) -> None:
    """Tell what a training run did, from its saved session.

    It may be what torch.save wrote of session.state_dict(), or of a mapping that has it somewhere, as a checkpoint of
    Lightning; or a folder: a Trainer's checkpoint-N or all of them, of which the newest counts, Accelerate's, or that
    of torch.distributed.checkpoint. The latter has an index that torch unpickles: give only folders that you trust.
    """
    from cacompile.report.run import report_state

    from .saved import find_state

    try:
        found, saved = find_state(state)
        report_state(saved, "-" if out is None else out)
    except ConvAwareError as error:
        raise _fail(error) from None
    if found != state:
        typer.echo(f"from: {found}", err=True)
    if out is not None:
        typer.echo(f"written: {out}")


@app.command()
def doctor(
    test: Annotated[bool, typer.Option("--test", help="compile and train a small model as well")] = False,
) -> None:
    """Tell what of cacompile works on this machine, and why the rest does not. Exit code 1: the backend cannot work."""
    from .doctor import examine, self_test

    checks = examine()
    if test and all(check.state != "fails" for check in checks):
        checks.append(self_test())
    table = Table(box=box.SIMPLE, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for check in checks:
        table.add_row(f"[{_COLORS[check.state]}]{check.state}", escape(check.name), escape(check.says))
    _console().print(table)
    if any(check.state == "fails" for check in checks):
        raise typer.Exit(1)
