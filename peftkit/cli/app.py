"""The command's verbs, put together.

Called by `cli.main`; imports one small module per verb group, none of which loads anything heavy.
"""

from typing import Annotated

import typer

from peftkit import __version__
from peftkit.cli import (
    adapters,
    compare,
    doctor,
    extract,
    merge,
    plan,
    plugins,
    recipes,
    remotes,
    report,
    run,
    scoring,
    shipped,
    store,
)


def build_app() -> typer.Typer:
    """All verbs. Help is plain text: drawing it would double the time to answer."""
    app = typer.Typer(
        rich_markup_mode=None,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or recipe, 130 after Ctrl-C, "
        "143 after SIGTERM. "
        "Results go to stdout, everything else to stderr.",
    )
    app.callback()(_root)
    run.add_to(app)
    plan.add_to(app)
    compare.add_to(app)
    recipes.add_to(app)
    shipped.add_to(app)
    report.add_to(app)
    scoring.add_to(app)
    merge.add_to(app)
    extract.add_to(app)
    group = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="The stored deltas.")
    adapters.add_to(group)
    store.add_to(group)
    remotes.add_to(group)
    app.add_typer(group, name="adapters")
    doctor.add_to(app)
    plugins.add_to(app)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        print(f"peftkit {__version__}")
        raise typer.Exit


def _root(
    *,
    debug: Annotated[
        bool, typer.Option("--debug", help="Any verb: show the traceback of a failure.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """Compare fine-tuning methods on one base model, and keep each result as a delta."""
