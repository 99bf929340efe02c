"""`python -m cacompile`, and the command `cacompile`."""

from __future__ import annotations

import argparse
import sys

from .version import VERSION


def main() -> None:
    """Run the command line; it needs the libraries of the extra `cli`, but for `doctor` and `--version`."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        sys.exit(_without_extras(str(error.name)))
    from .cli import app

    app()


def _without_extras(missing: str) -> int | str:
    """What can be done without the library that is missing; the exit status, or what to say."""
    if sys.argv[1:] == ["--version"]:
        print(f"cacompile {VERSION}")
        return 0
    if sys.argv[1:2] != ["doctor"]:
        return f"the command line of cacompile needs {missing}: pip install 'cacompile[cli]'"
    from .doctor import report

    parser = argparse.ArgumentParser("cacompile doctor", description="Tell what of cacompile works on this machine.")
    parser.add_argument("--test", action="store_true", help="compile and train a small model as well")
    return report(parser.parse_args(sys.argv[2:]).test)


if __name__ == "__main__":
    main()
