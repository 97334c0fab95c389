"""The comparison's tables as text cells: results, memory by phase, pairs.

Called by the documents, the page and the command line; imports the results.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from peftkit.reporting.figure_text import (
    NONE,
    interval,
    mib,
    millions,
    number,
    percent,
    probability,
    score,
    signed,
    words,
)

if TYPE_CHECKING:
    from peftkit.reporting.gathering import Run
    from peftkit.reporting.pairs import McNemar, Pair
    from peftkit.reporting.results import Row, Table

MAX_REASON: Final = 100
BESIDE: Final = "†"
"""Marks the wall seconds of an arm whose runs had another run beside them."""
PHASE_WORDS: Final = {"load": "load", "train_step": "train", "eval": "eval"}
KIND_WORDS: Final = {
    "allocated_bytes": "allocated",
    "reserved_bytes": "reserved",
    "resident_bytes": "resident",
}


@dataclass(frozen=True)
class View:
    """A table ready to be shown: one text a cell, `–` for none."""

    name: str
    headers: tuple[str, ...]
    """With their unit."""
    texts: frozenset[int]
    """Columns that hold words; the others hold numbers and are set to the right."""
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class _Column:
    header: str
    cell: "Callable[[Row], str]"
    is_text: bool = False
    always: bool = False
    """Shown even if no row has it."""


def result_view(table: "Table") -> View:
    """One row an arm: score, intervals, cost."""
    return _view("results", _result_columns(table), table.rows)


def short_view(table: "Table") -> View:
    """What fits the width of a terminal."""
    wanted = (
        "method",
        "group",
        words(table.metric),
        "seeds",
        "train peak",
        "train s",
        "delta",
        "status",
    )
    both = "95% seeds + examples"
    columns = [c for c in _result_columns(table) if c.header.startswith((*wanted, both))]
    return _view("results", [c for c in columns if "resident" not in c.header], table.rows)


def memory_view(table: "Table") -> View:
    """One row an arm: peaks by kind and phase, and what the planner expected."""
    columns = [_Column("method", lambda row: row.label, is_text=True, always=True)]
    for kind, word in KIND_WORDS.items():
        columns += [_peak_column(f"{word}: {p}", phase, kind) for phase, p in PHASE_WORDS.items()]
    for phase, word in PHASE_WORDS.items():
        columns += _prediction_columns(phase, word)
    return _view("memory", columns, table.rows)


def pair_view(table: "Table", most: int) -> View:
    """One row a pair, the clearest first."""
    ordered = table.pairs.clearest(most)
    headers = ["A", "B", "A − B", "95% interval", "p", "p adjusted", "told apart", "detectable"]
    rows = [_pair_cells(pair) for pair in ordered]
    if any(pair.mcnemar for pair in ordered):
        headers.append("McNemar p by seed")
    else:
        rows = [row[:-1] for row in rows]
    return View("pairs", tuple(headers), frozenset({0, 1, 6, 8}), tuple(rows))


def choice_view(table: "Table") -> View:
    """What to take at a given memory: the arms that no cheaper one reaches in mean score."""
    rows = []
    for below, row in pairwise([None, *best_by_memory(table)]):
        assert row is not None
        pair = table.pairs.between(row.label, below.label) if below else None
        told = NONE if below is None else _told_from_below(table, row, pair)
        sizes = (mib(row.figures.needed_bytes), mib(row.figures.resident_bytes))
        rows.append((*sizes, row.label, score(row.score), told))
    measures = ("live tensors from, MiB", "resident, MiB")
    headers = (*measures, "take", words(table.metric), "told apart from the row above")
    return View("choices", headers, frozenset({2, 4}), tuple(rows))


def best_by_memory(table: "Table") -> "list[Row]":
    """The arms with the best score of all that need no more live tensors, the cheapest first."""
    sign = -1 if table.higher_is_better else 1
    found: list[Row] = []
    scored = [row for row in table.rows if row.score is not None and row.figures.needed_bytes]
    for row in sorted(scored, key=lambda r: (r.figures.needed_bytes or 0, sign * (r.score or 0))):
        if not found or sign * (row.score or 0) < sign * (found[-1].score or 0):
            found.append(row)
    return found


def _told_from_below(table: "Table", row: "Row", pair: "Pair | None") -> str:
    if pair is None:
        return "not tested"
    is_ahead = (pair.lead(row.label) > 0) == table.higher_is_better
    return _told(pair) if is_ahead or not pair.is_separated else "no: behind by the tested seeds"


def _told(pair: "Pair") -> str:
    told = f"{'yes' if pair.is_separated else 'no'} (adjusted p {probability(pair.p_adjusted)})"
    return told if pair.covers_seeds else f"{told}, these models only"


def marked_label(row: "Row") -> str:
    """The arm's label with the letters of its conditions."""
    return f"{row.label} [{', '.join(row.notes)}]" if row.notes else row.label


def status_text(row: "Row") -> str:
    """`completed`, or how many seeds ended how, with the first reason of those that failed."""
    statuses = row.figures.statuses
    words = [status.replace("_", " ") for status in statuses]
    if len(statuses) > 1:
        words = [f"{n} {word}" for n, word in zip(statuses.values(), words, strict=True)]
    reasons = [reason_of(run) for run in row.arm.runs if not run.is_completed]
    if not reasons:
        return ", ".join(words)
    shown = reasons[0]
    cut = f"{shown[: MAX_REASON - 1]}…" if len(shown) > MAX_REASON else shown
    return f"{', '.join(words)}: {cut}"


def reason_of(run: "Run") -> str:
    """Why a run was not completed, on one line."""
    return " ".join((run.error or "no reason was recorded").split())


def _view(name: str, columns: "Sequence[_Column]", rows: "Sequence[Row]") -> View:
    made = [(column, [column.cell(row) for row in rows]) for column in columns]
    kept = [(c, cells) for c, cells in made if c.always or any(cell != NONE for cell in cells)]
    texts = frozenset(place for place, (column, _) in enumerate(kept) if column.is_text)
    body = tuple(zip(*(cells for _, cells in kept), strict=True))
    return View(name, tuple(column.header for column, _ in kept), texts, body)


def _result_columns(table: "Table") -> list[_Column]:
    return [
        _Column("method", marked_label, is_text=True, always=True),
        _Column(words(table.metric), lambda row: score(row.score), always=True),
        _Column("95% seeds + examples", _full_interval),
        _Column("95% seeds", _seed_interval),
        _Column("group", lambda row: row.letters or NONE, is_text=True),
        _Column("seeds", partial(_seeds, bool(table.examples)), always=True),
        _Column("train peak, MiB", lambda row: mib(row.figures.peak_bytes)),
        _Column("predicted, MiB", lambda row: mib(row.figures.predicted["train_step"])),
        _Column("error, %", lambda row: percent(row.figures.prediction_error)),
        _Column("train s", _train_seconds),
        _Column("processor s", lambda row: number(row.figures.train_cpu_seconds)),
        _Column("examples/s", lambda row: number(row.figures.examples_per_second, 1)),
        _Column("tokens/s", lambda row: number(row.figures.tokens_per_second)),
        _Column("trainable, M", lambda row: millions(row.figures.trainable_parameters)),
        _Column("delta, MiB", lambda row: mib(row.figures.delta_bytes)),
        _Column("cost of a run", lambda row: number(row.figures.cost, 4)),
        _Column("status", status_text, is_text=True, always=True),
    ]


def _seeds(is_tested: bool, row: "Row") -> str:
    """`3`, or `3, 1 tested`; in a table without tests nothing is missing."""
    tested, scored = len(row.tested_seeds), len(row.scores)
    return f"{scored}, {tested} tested" if is_tested and tested < scored else str(scored)


def _train_seconds(row: "Row") -> str:
    shown = number(row.figures.train_seconds)
    return f"{shown}{BESIDE}" if shown != NONE and row.figures.runs_beside_another else shown


def _full_interval(row: "Row") -> str:
    return interval(row.interval) + ("*" if row.is_of_one_seed else "")


def _seed_interval(row: "Row") -> str:
    return "one seed" if len(row.scores) == 1 else interval(row.seed_interval)


def _peak_column(header: str, phase: str, kind: str) -> _Column:
    return _Column(header, lambda row: mib(row.figures.memory[phase][kind]))


def _prediction_columns(phase: str, word: str) -> list[_Column]:
    return [
        _Column(f"predicted: {word}", lambda row: mib(row.figures.predicted[phase])),
        _Column(f"error: {word}, %", lambda row: percent(row.figures.prediction_errors[phase])),
    ]


def _pair_cells(pair: "Pair") -> tuple[str, ...]:
    told = "yes" if pair.is_separated else "no"
    return (
        pair.a,
        pair.b,
        signed(pair.difference),
        interval(pair.interval),
        probability(pair.p),
        probability(pair.p_adjusted),
        told if pair.covers_seeds else f"{told}, these models only",
        f"{pair.detectable:.4f}",
        _mcnemar_text(pair.mcnemar),
    )


def _mcnemar_text(tests: "tuple[McNemar, ...]") -> str:
    return ", ".join(f"{t.seed}: {probability(t.p)}" for t in tests) or NONE
