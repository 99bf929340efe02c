"""The table of options, as Config has them: for these pages, and for README, whose test compares."""

from dataclasses import Field, fields
from typing import Any

from cacompile import Config

HEAD = "| option | default | allowed | meaning |\n|---|---|---|---|"


def option_row(option: Field[Any]) -> str:
    low, high, choices = (option.metadata[key] for key in ("low", "high", "choices"))
    named = ", ".join(filter(None, [*(f"`{c}`" for c in choices), option.metadata["callables"]]))
    named = named or "names and patterns" * option.metadata["patterns"]
    allowed = named if named else f"{low} to {high}" if high is not None else f">= {low}"
    return f"| `{option.name}` | `{option.default}` | {allowed} | {option.metadata['doc']} |"


def option_table() -> str:
    return "\n".join([HEAD, *map(option_row, fields(Config))])
