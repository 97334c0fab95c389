"""The comparison as one HTML file that needs no network and, but for sorting, no script.

Called by the documents; imports the charts, the tables and the wording. Texts of runs reach the
page only through the template's escaping, or through `html.escape` in the drawings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from peftkit.reporting import svg
from peftkit.reporting.charts import Chart, charts_of
from peftkit.reporting.figure_text import number, plural, score, words
from peftkit.reporting.repeating import commands, common_part, own_part, recipe_yaml
from peftkit.reporting.tables import (
    View,
    choice_view,
    memory_view,
    pair_view,
    reason_of,
    result_view,
)
from peftkit.reporting.wording import (
    ConditionGroup,
    beside_sentence,
    condition_groups,
    sample_sentence,
    summary_sentences,
)

if TYPE_CHECKING:
    from peftkit.reporting.comparison import Comparison
    from peftkit.reporting.gathering import Run
    from peftkit.reporting.results import Row, Table

FILES: Final = Path(__file__).parent / "page_files"
MAX_PAIRS: Final = 100
MAX_WHOLE_RECIPES: Final = 100
"""Of one table; with more arms the recipes are shown as what they share and what is their own."""
MAX_PROBLEMS: Final = 200


@dataclass(frozen=True)
class Section:
    """One arm: how it was run and how to run it again."""

    anchor: str
    label: str
    colour: int
    shape: int
    commands: list[str]
    recipe: str
    runs: list[tuple[str, ...]]
    """Seed, status, score, training seconds, delta, folder, reason of each run."""


@dataclass(frozen=True)
class TablePart:
    """One table of the comparison, ready for the template."""

    anchor: str
    title: str
    metric: str
    sentences: list[str]
    conditions: list[ConditionGroup]
    condition_count: int
    choices: View
    results: View
    marks: list[tuple[str, int, int, bool, tuple[str, ...]]]
    """Of each row: anchor, colour, shape, whether in the best group, notes."""
    has_single_seeds: bool
    beside: str
    """Why some wall seconds are not to be trusted; may be empty."""
    charts: list[Chart]
    memory: View
    pairs: View
    pair_count: int
    sections: list[Section]
    common_recipe: str
    failures: list[tuple[str, int, str, str]]
    """Label, seed, status, reason."""


def page(comparison: "Comparison") -> str:
    """The whole file."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(FILES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    is_alone = len(comparison.tables) == 1
    parts = [_part(table, n, is_alone=is_alone) for n, table in enumerate(comparison.tables)]
    return environment.get_template("page.html").render(
        parts=parts,
        style=Markup((FILES / "page.css").read_text(encoding="utf-8")),
        script=Markup((FILES / "page.js").read_text(encoding="utf-8")),
        shapes=svg.SHAPES,
        markup=Markup,
        sample=sample_sentence([row for table in comparison.tables for row in table.rows]),
        problems=[str(problem) for problem in comparison.problems[:MAX_PROBLEMS]],
        problem_count=len(comparison.problems),
        overview=_overview(comparison),
        price=comparison.price_per_hour,
    )


def _overview(comparison: "Comparison") -> str:
    rows = [row for table in comparison.tables for row in table.rows]
    runs = plural(sum(len(row.arm.runs) for row in rows), "run")
    sets = f", on {plural(len(comparison.tables), 'data set')}" if comparison.tables[1:] else ""
    return f"{runs} of {plural(len(rows), 'recipe')}{sets}"


def _part(table: "Table", number: int, *, is_alone: bool) -> TablePart:
    anchors = [f"t{number}-{place}" for place in range(len(table.rows))]
    is_long = len(table.rows) > MAX_WHOLE_RECIPES
    common = common_part([row.arm for row in table.rows]) if is_long else {}
    sentences = summary_sentences(table)
    return TablePart(
        anchor=f"t{number}",
        title=table.title,
        metric=words(table.metric),
        # Of a table that is alone, the head of the page has said it.
        sentences=sentences[1:] if table.is_sample and is_alone else sentences,
        conditions=condition_groups(table),
        condition_count=len(table.conditions),
        choices=choice_view(table),
        results=result_view(table),
        marks=_marks(table.rows, anchors),
        has_single_seeds=any(row.is_of_one_seed for row in table.rows),
        beside=beside_sentence(table),
        charts=charts_of(table, anchors),
        memory=memory_view(table),
        pairs=pair_view(table, MAX_PAIRS),
        pair_count=len(table.pairs),
        sections=[
            _section(row, place, anchor, common if is_long else None)
            for place, (row, anchor) in enumerate(zip(table.rows, anchors, strict=True))
        ],
        common_recipe="".join(f"{k}: {v}\n" for k, v in common.items()),
        failures=[
            (row.label, run.seed, run.status.replace("_", " "), reason_of(run))
            for row in table.rows
            for run in row.arm.runs
            if not run.is_completed
        ],
    )


def _marks(
    rows: "Sequence[Row]", anchors: Sequence[str]
) -> list[tuple[str, int, int, bool, tuple[str, ...]]]:
    return [
        (anchor, *svg.style_of(place), row.in_best_group, row.notes)
        for place, (row, anchor) in enumerate(zip(rows, anchors, strict=True))
    ]


def _section(row: "Row", place: int, anchor: str, common: dict[str, object] | None) -> Section:
    colour, shape = svg.style_of(place)
    recipe = row.arm.recipe
    text = own_part(row.arm, common) if common is not None else recipe_yaml(recipe or {})
    runs = [_run_cells(run, row) for run in (*row.arm.runs, *row.arm.superseded)]
    return Section(
        anchor=anchor,
        label=row.label,
        colour=colour,
        shape=shape,
        commands=commands(row.arm),
        recipe=text if recipe is not None else "",
        runs=runs,
    )


def _run_cells(run: "Run", row: "Row") -> tuple[str, ...]:
    is_old = run in row.arm.superseded
    record = run.record
    return (
        str(run.seed),
        f"{run.status.replace('_', ' ')}{', not counted' if is_old else ''}",
        score(None if is_old else row.scores.get(run.seed)),
        number(record.seconds.train if record else None),
        (record.delta if record else None) or "–",
        str(run.folder),
    )
