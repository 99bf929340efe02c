"""Sphinx: `make docs` builds these pages into docs/_build."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from docstrings import convert
from option_table import option_table
from sphinx.application import Sphinx

import cacompile

project = "cacompile"
release = version = cacompile.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"cacompile {release}"
html_copy_source = False
html_show_copyright = False

autodoc_member_order = "bysource"
autodoc_typehints = "description"

myst_enable_extensions = ["substitution"]
myst_substitutions = {"option_table": option_table()}
myst_heading_anchors = 3


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", convert)
