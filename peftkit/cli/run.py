"""The verb `run`: check the recipe here, then train in processes of its own.

Called by `cli.app`; imports the recipe and the launcher inside the verb.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from peftkit.errors import UsageError

EXAMPLE = (
    "Example: peftkit run recipes/lora_sst2.yaml training.learning_rate=5e-4 --nproc 2 "
    "-- --mixed_precision bf16"
)


class RunCommand(TyperCommand):
    """Shows in the usage line what the parser leaves in `Context.args`."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The words after `peftkit run`."""
        return ["[OPTIONS]", "RECIPE", "[KEY=VALUE]...", "[-- LAUNCH ARGUMENT...]"]


def add_to(app: typer.Typer) -> None:
    """Register `run`."""
    settings = {"allow_extra_args": True}
    app.command("run", cls=RunCommand, context_settings=settings, epilog=EXAMPLE)(run_verb)


def run_verb(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file.")],
    *,
    nproc: Annotated[
        int | None, typer.Option("--nproc", min=1, help="Processes on this machine; default 1.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run's folder if it exists.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run folder's last checkpoint.")
    ] = False,
    resume_weights_only: Annotated[
        bool,
        typer.Option("--resume-weights-only", help="Begin anew with that checkpoint's weights."),
    ] = False,
) -> None:
    """Train by a recipe.

    KEY=VALUE overrides a key of the recipe, such as seed=1. What follows `--` goes to
    `accelerate launch`. The run leaves a delta in the registry and a record in its folder.
    """
    from peftkit.cli.launch import launch
    from peftkit.recipe import load_recipe

    overrides, extra = split_arguments(context.args)
    flags = {
        "--overwrite": overwrite,
        "--resume": resume,
        "--resume-weights-only": resume_weights_only,
    }
    given = [flag for flag, on in flags.items() if on]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)}: give one of them")
    load_recipe(recipe, overrides)
    debug = ["--debug"] if context.obj else []
    code = launch([str(recipe), *overrides, *given, *debug], nproc=nproc, extra=extra)
    raise typer.Exit(code)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides and launcher arguments.

    The parser drops `--` but lets no unknown dash pass before it: the first one starts the rest.
    """
    dashes = [index for index, word in enumerate(arguments) if word.startswith("-")]
    end = dashes[0] if dashes else len(arguments)
    return list(arguments[:end]), list(arguments[end:])
