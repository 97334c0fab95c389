"""The `peftkit` command; `main` is what the console script and `python -m peftkit` call.

Top of the import order. Importing this package loads nothing: typer comes with `main`, and each
verb imports what it needs inside its own body, so that `--help` answers at once.
"""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out one command line (`sys.argv[1:]` by default); return 0, 1 or 2 (usage)."""
    from peftkit.cli.app import build_app
    from peftkit.cli.failures import exit_code_of

    arguments, debug = take_debug(list(sys.argv[1:] if argv is None else argv))
    app = build_app()
    return exit_code_of(lambda: app(arguments, prog_name="peftkit", obj=debug), debug=debug)


def take_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """Remove `--debug`, which every verb takes anywhere before `--`; say whether it was there."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    before = arguments[:end]
    return [word for word in before if word != "--debug"] + arguments[end:], "--debug" in before
