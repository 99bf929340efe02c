"""The tables of docs/kernels.md.

python -m benchmarks.kernels.docs               # writes them anew, in minutes
python -m benchmarks.kernels.docs --rooflines   # only the one for which nothing is compiled
"""

from __future__ import annotations

import argparse

from benchmarks.kernels.resources import resource_table
from benchmarks.kernels.rooflines import roofline_table
from benchmarks.lib.rows import ROOT

PAGE = ROOT / "docs" / "kernels.md"


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: written by benchmarks.kernels.docs -->\n\n", f"\n\n<!-- end of {name} -->"


def read_section(text: str, name: str) -> str:
    """What stands between the marks of that name."""
    begin, end = marks(name)
    return text.split(begin)[1].split(end)[0]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rooflines", action="store_true", help="only the table that needs no compiling")
    args = parser.parse_args(argv)
    tables = {"rooflines": roofline_table} | ({} if args.rooflines else {"resources": resource_table})
    for name, table in tables.items():
        text, (begin, end) = PAGE.read_text(), marks(name)
        PAGE.write_text(text.replace(begin + read_section(text, name) + end, begin + table() + end))


if __name__ == "__main__":
    main()
