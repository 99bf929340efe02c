"""The README's claims that a machine can check."""

from dataclasses import fields
from pathlib import Path

from option_table import option_row

from cacompile import Config

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_options_table_is_what_config_says():
    table = [line for line in README.splitlines() if line.startswith("| `")]
    assert table == [option_row(option) for option in fields(Config)]
