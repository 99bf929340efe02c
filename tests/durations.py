"""Seconds of tests by folder and file, as a Markdown table, from what `pytest --durations=0` has printed.

python -m pytest --durations=0 | tee before.txt
python -m tests.durations before.txt after.txt --names before after
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from pathlib import Path

_LINE = re.compile(r"^\s*([\d.]+)s (?:setup|call|teardown)\s+tests/([^:]+)::", re.M)


def seconds_by_file(printed: str) -> Counter[str]:
    """File, from tests/ on -> seconds of setups, calls and teardowns; phases under 5 ms are not printed."""
    seconds: Counter[str] = Counter()
    for found in _LINE.finditer(printed):
        seconds[found[2]] += float(found[1])
    return seconds


def table(runs: dict[str, Counter[str]], *, files: bool = False) -> str:
    """Rows by folder (by file, if asked), most seconds in the first run first; an empty cell: did not run."""
    if not files:
        runs = {name: by_folder(run) for name, run in runs.items()}
    first = next(iter(runs.values()))
    rows = sorted({row for run in runs.values() for row in run}, key=lambda row: (-first[row], row))
    lines = [f"| {'file' if files else 'folder'} | {' | '.join(runs)} |", "|---" + "|--:" * len(runs) + "|"]
    lines += [f"| `tests/{row}` | {' | '.join(_cell(run, row) for run in runs.values())} |" for row in rows]
    lines += [f"| **sum** | {' | '.join(f'{run.total():.0f}' for run in runs.values())} |"]
    return "\n".join(lines)


def by_folder(seconds: Counter[str]) -> Counter[str]:
    """Folder -> seconds of all its files; files right in tests/ count for themselves."""
    folders: Counter[str] = Counter()
    for file, value in seconds.items():
        folders[f"{file.split('/')[0]}/" if "/" in file else file] += value
    return folders


def _cell(run: Counter[str], row: str) -> str:
    return f"{run[row]:.1f}" if row in run else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("printed", nargs="+", type=Path, help="files with what pytest printed, one per run")
    parser.add_argument("--names", nargs="+", help="heads of their columns; the files' names by default")
    parser.add_argument("--files", action="store_true", help="a row for each file, not each folder")
    args = parser.parse_args()
    names = args.names or [path.stem for path in args.printed]
    if len(names) != len(args.printed):
        parser.error(f"{len(args.printed)} files but {len(names)} names")
    runs = {name: seconds_by_file(path.read_text(encoding="utf-8")) for name, path in zip(names, args.printed)}
    print(table(runs, files=args.files))


if __name__ == "__main__":
    main()
