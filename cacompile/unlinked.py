"""The package `cacompile.passes` in a checkout without links, where git has left a file that says where one leads."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

LINK = Path(__file__).with_name("passes")


class PassesFinder(MetaPathFinder):
    """Finds one package in the folder that a link should have led to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname != f"{__package__}.passes":
            return None
        return spec_from_file_location(
            fullname, self.folder / "__init__.py", submodule_search_locations=[str(self.folder)]
        )


def find_passes(link: Path = LINK) -> None:
    """Let `cacompile.passes` be imported where the link is a file; anywhere else it is already found."""
    if link.is_file():
        # first, as another checkout that is installed in place has a finder, too
        sys.meta_path.insert(0, PassesFinder((link.parent / link.read_text(encoding="utf-8")).resolve()))
