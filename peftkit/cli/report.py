"""The verb `report`: the records of finished runs, compared. Runs nothing.

Called by `cli.app`; imports the comparison inside the verb. It loads no torch.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftkit.cli.output import JsonFlag, note, print_json, print_table

if TYPE_CHECKING:
    from peftkit.reporting.comparison import Comparison

EXAMPLE = "Example: peftkit report runs benchmarks/results/runs --out comparison"
DEFAULT_OUT = Path("comparison")
MAX_PRICE = 1e9
"""Keeps infinity out, and any cost a finite number."""


def add_to(app: typer.Typer) -> None:
    """Register `report`."""
    app.command("report", epilog=EXAMPLE)(report)


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...",
            help="Folders of runs, searched all the way; a record.json is its folder.",
        ),
    ],
    *,
    out: Annotated[
        Path, typer.Option("--out", help="Where comparison.{json,csv,md,html} go.")
    ] = DEFAULT_OUT,
    price_per_hour: Annotated[
        float | None,
        typer.Option(
            "--price-per-hour",
            min=0,
            max=MAX_PRICE,
            help="Of the machine: adds the cost of a run.",
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Compare finished runs.

    Reads their records, whatever made them, and writes one table for each validation set. A run
    that failed is a row with its reason. Exits 1 if a folder, a record or a file of predictions
    could not be read; the report of the others is written all the same.
    """
    from peftkit.reporting.comparison import compare, write_comparison

    comparison = compare(folders, price_per_hour=price_per_hour)
    for problem in comparison.problems:
        note(str(problem))
    paths = write_comparison(comparison, out)
    if as_json:
        print_json(comparison.as_json())
    else:
        print_comparison(comparison)
    for path in paths:
        note(str(path))
    raise typer.Exit(0 if comparison.is_complete else 1)


def print_comparison(comparison: "Comparison") -> None:
    """Each table in short, and below it what it comes to."""
    from peftkit.reporting.tables import short_view
    from peftkit.reporting.wording import beside_sentence, condition_sentence, summary_sentences

    for table in comparison.tables:
        print(f"{table.title}: {table.metric}")
        for condition in table.conditions:
            values = condition_sentence(condition.values, len(table.rows))
            print(f"[{condition.letter}] {condition.condition}: {values}")
        view = short_view(table)
        print_table(view.headers, view.rows, numbers=set(range(len(view.headers))) - view.texts)
        if beside := beside_sentence(table):
            print(beside)
        print("\n".join(summary_sentences(table)), end="\n\n")
