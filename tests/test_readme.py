"""The README's claims that a machine can check."""

from dataclasses import fields
from pathlib import Path

from cacompile import Config

README = (Path(__file__).parents[1] / "README.md").read_text()


def option_row(option) -> str:
    low, high, choices = (option.metadata[key] for key in ("low", "high", "choices"))
    named = ", ".join(filter(None, [*(f"`{c}`" for c in choices), option.metadata["callables"]]))
    allowed = named if choices else f"{low} to {high}" if high is not None else f">= {low}"
    return f"| `{option.name}` | `{option.default}` | {allowed} | {option.metadata['doc']} |"


def test_options_table_is_what_config_says():
    table = [line for line in README.splitlines() if line.startswith("| `")]
    assert table == [option_row(option) for option in fields(Config)]
