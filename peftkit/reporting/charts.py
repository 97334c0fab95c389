"""The charts of one table, made of its rows.

Called by the page; imports the drawings.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from peftkit.reporting.curves import Curve, Line, curves
from peftkit.reporting.figure_text import MIB, interval, score, words
from peftkit.reporting.figures import PHASES
from peftkit.reporting.memory_bars import Bar, memory_bars
from peftkit.reporting.pareto import Cost, Point, pareto
from peftkit.reporting.tables import BESIDE
from peftkit.reporting.wording import beside_sentence

if TYPE_CHECKING:
    from peftkit.reporting.results import Row, Table

MAX_CURVES: Final = 12
MAX_BARS: Final = 40
BESIDE_NOTE: Final = f"{BESIDE} Some of these times were taken beside another run on the machine."


@dataclass(frozen=True)
class Chart:
    """An SVG drawing with its heading and what must be said below it."""

    title: str
    drawing: str
    note: str
    kind: str


def charts_of(table: "Table", anchors: Sequence[str]) -> list[Chart]:
    """The charts that the rows have figures for; `anchors` are the ids of the rows' sections."""
    labels = short_labels([row.label for row in table.rows])
    made = [*_paretos(table, anchors, labels), *_curves(table, anchors, labels)]
    return [*made, *_memory(table, anchors)]


def short_labels(labels: Sequence[str]) -> list[str]:
    """Without the words, between underscores, that all of them hold.

    As they are if that leaves one bare or two alike.
    """
    parts = [label.split("_") for label in labels]
    shared = set.intersection(*map(set, parts)) if labels[1:] else set()
    short = ["_".join(part for part in own if part not in shared) for own in parts]
    return short if all(short) and len(set(short)) == len(set(labels)) else list(labels)


def _paretos(table: "Table", anchors: Sequence[str], labels: Sequence[str]) -> list[Chart]:
    costs: list[tuple[str, str, Callable[[Row], float | None]]] = [
        ("Score and memory", "peak of live tensors in a training step, MiB", _peak_mib),
        ("Score and time", "training time, minutes", _minutes),
        ("Score and delta size", "size of the delta, MiB", _delta_mib),
    ]
    charts = []
    for title, axis, value in costs:
        points = _points(table, anchors, labels, (axis, value))
        if points:
            cost = Cost(axis, words(table.metric), table.higher_is_better)
            note = BESIDE_NOTE if value is _minutes and beside_sentence(table) else ""
            charts.append(Chart(title, pareto(points, cost), note, "pareto"))
    return charts


def _peak_mib(row: "Row") -> float | None:
    return row.figures.peak_bytes and row.figures.peak_bytes / MIB


def _minutes(row: "Row") -> float | None:
    return row.figures.train_seconds and row.figures.train_seconds / 60


def _delta_mib(row: "Row") -> float | None:
    return row.figures.delta_bytes and row.figures.delta_bytes / MIB


def _points(
    table: "Table",
    anchors: Sequence[str],
    labels: Sequence[str],
    axis: "tuple[str, Callable[[Row], float | None]]",
) -> list[Point]:
    title, value = axis
    unit = title.rpartition(", ")[2]
    found = []
    for place, row in enumerate(table.rows):
        cost = value(row)
        if row.score is None or not cost:
            continue
        # An interval over other seeds than the score's may lie beside it.
        bounds = (None if row.is_partly_tested else row.interval) or row.seed_interval
        around = f" ({interval(bounds)})" if bounds else ""
        tip = f"{row.label}: {words(table.metric)} {score(row.score)}{around} at {cost:,.4g} {unit}"
        found.append(Point(place, anchors[place], labels[place], tip, cost, row.score, bounds))
    return found


def _curves(table: "Table", anchors: Sequence[str], labels: Sequence[str]) -> list[Chart]:
    wanted: list[tuple[str, str, Callable[[dict[str, float], float], float | None]]] = [
        (
            f"Held-out {words(table.metric)}",
            words(table.metric),
            lambda held, _: held.get(table.metric),
        ),
        ("Training loss", "training loss", lambda _, loss: loss),
    ]
    charts = []
    for title, name, value in wanted:
        arms = [
            Curve(place, anchors[place], labels[place], lines)
            for place, row in enumerate(table.rows)
            if (lines := _lines(row, value))
        ]
        if arms:
            note = f"The best {MAX_CURVES} of {len(arms)} methods." if arms[MAX_CURVES:] else ""
            charts.append(Chart(title, curves(arms[:MAX_CURVES], name), note, "curves"))
    return charts


def _lines(
    row: "Row", value: Callable[[dict[str, float], float], float | None]
) -> tuple[Line, ...]:
    """One line a run that was evaluated while it trained; values that are not finite left out."""
    found = []
    for record in (run.record for run in row.arm.runs if run.record):
        points = [(e["step"], value(e["holdout"], e["loss"])) for e in record.history]
        line = [(step, v) for step, v in points if v is not None and math.isfinite(v)]
        if line:
            found.append(line)
    return tuple(found)


def _memory(table: "Table", anchors: Sequence[str]) -> list[Chart]:
    bars = []
    for place, row in enumerate(table.rows):
        measured = {phase: row.figures.memory[phase]["allocated_bytes"] for phase in PHASES}
        peaks = {str(phase): peak for phase, peak in measured.items() if peak}
        if peaks:
            predicted = row.figures.predicted["train_step"]
            bars.append(Bar(place, anchors[place], row.label, peaks, predicted))
    if not bars:
        return []
    note = f"The first {MAX_BARS} of {len(bars)} methods." if bars[MAX_BARS:] else ""
    return [Chart("Memory by phase", memory_bars(bars[:MAX_BARS]), note, "memory")]
