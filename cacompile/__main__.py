"""`python -m cacompile`, and the command `cacompile`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; it needs the libraries of the extra `cli`, but for `doctor`."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        if sys.argv[1:2] == ["doctor"]:
            from .doctor import report

            sys.exit(report(test="--test" in sys.argv[2:]))
        sys.exit(f"the command line of cacompile needs {error.name}: pip install 'cacompile[cli]'")
    from .cli import app

    app()


if __name__ == "__main__":
    main()
