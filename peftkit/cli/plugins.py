"""The verb `plugins`: the methods and tasks that a recipe may name.

Called by `cli.app`; a broken plugin is a row of the table, with its error.
"""

from dataclasses import asdict

import typer

from peftkit.cli.output import JsonFlag, print_json, print_table


def add_to(app: typer.Typer) -> None:
    """Register `plugins`."""
    app.command("plugins", epilog="Example: peftkit plugins --json")(plugins)


def plugins(*, as_json: JsonFlag = False) -> None:
    """List methods and tasks.

    Says where each comes from, and what is wrong with a broken one.
    """
    from peftkit.plugins import listing

    found = listing()
    if as_json:
        print_json([asdict(info) for info in found])
        return
    rows = [
        [i.group, i.name, i.origin, "broken" if i.error else "ok", i.error or ""] for i in found
    ]
    print_table(["group", "name", "origin", "state", "error"], rows)
