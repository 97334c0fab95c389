"""The verb `doctor`: one line per thing that a run needs, with advice where it is missing.

Called by `cli.app`; the checks themselves are in `cli.checks`.
"""

from dataclasses import asdict

import typer

from peftkit.cli.output import JsonFlag, print_json, print_table


def add_to(app: typer.Typer) -> None:
    """Register `doctor`."""
    app.command("doctor", epilog="Example: peftkit doctor --json")(doctor)


def doctor(*, as_json: JsonFlag = False) -> None:
    """Say what this machine can do.

    One line a check, with advice; exits 1 if something that every run needs fails.
    """
    from peftkit.cli.checks import run_checks

    checks = run_checks()
    if as_json:
        print_json([asdict(check) for check in checks])
    else:
        rows = [[check.state, check.name, check.found, check.advice] for check in checks]
        print_table(["state", "what", "found", "advice"], rows)
    if any(check.state == "fail" for check in checks):
        raise typer.Exit(1)
