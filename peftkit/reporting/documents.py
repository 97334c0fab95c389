"""The comparison as files: JSON with everything, CSV of the runs, Markdown, and the page.

Called by `comparison.write_comparison`; imports the tables and the wording.
"""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from peftkit.errors import RunError
from peftkit.reporting.figures import KINDS, PHASES
from peftkit.reporting.page import page
from peftkit.reporting.tables import (
    View,
    choice_view,
    memory_view,
    pair_view,
    reason_of,
    result_view,
)
from peftkit.reporting.wording import beside_sentence, condition_sentence, summary_sentences
from peftkit.staging import write_file

if TYPE_CHECKING:
    from peftkit.reporting.comparison import Comparison
    from peftkit.reporting.gathering import Run
    from peftkit.reporting.pairs import Pair
    from peftkit.reporting.results import Row, Table

SCHEMA_VERSION: Final = 1
MAX_PAIRS_IN_TEXT: Final = 100
MAX_PAIRS_IN_JSON: Final = 2000


def write_documents(comparison: "Comparison", out: Path) -> list[Path]:
    """Write all four; each replaces an older one whole.

    Raises:
        RunError: a file cannot be written.
    """
    texts = {
        "json": json_text(as_json(comparison)),
        "csv": csv_text(comparison),
        "md": markdown(comparison),
        "html": page(comparison),
    }
    paths = [out / f"comparison.{ending}" for ending in texts]
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path, text in zip(paths, texts.values(), strict=True):
            write_file(path, text.encode())
    except OSError as error:
        raise RunError(f"{out}: cannot be written: {error.strerror}; name another --out") from None
    return paths


def as_json(comparison: "Comparison") -> dict[str, Any]:
    """Everything, as JSON types; infinite degrees of freedom are null."""
    return {
        "schema_version": SCHEMA_VERSION,
        "price_per_hour": comparison.price_per_hour,
        "problems": [asdict(problem) for problem in comparison.problems],
        "tables": [_table(table) for table in comparison.tables],
    }


def json_text(content: dict[str, Any]) -> str:
    """One line an arm and a pair: indenting tens of thousands of them would take seconds."""
    return "".join(_json_lines(content)) + "\n"


def csv_text(comparison: "Comparison") -> str:
    """One line a run, failed ones included."""
    text = io.StringIO()
    lines = [
        _csv_line(t, row, run) for t in comparison.tables for row in t.rows for run in _of(row)
    ]
    writer = csv.DictWriter(text, fieldnames=list(lines[0]) if lines else ["run"])
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def markdown(comparison: "Comparison") -> str:
    """Summary, conditions and tables, for a README or a pull request."""
    parts = ["# Comparison"]
    for table in comparison.tables:
        parts += [f"## {_escaped(table.title)}: {_escaped(table.metric)}"]
        parts += [_escaped(" ".join(summary_sentences(table)))]
        parts += _conditions(table)
        if (choices := choice_view(table)).rows:
            parts += ["### What to take at a given memory", _grid(choices)]
        parts += [_grid(result_view(table))]
        parts += [_escaped(beside)] if (beside := beside_sentence(table)) else []
        if any(row.is_of_one_seed for row in table.rows):
            parts += ["\\* one seed: the interval covers the draw of examples only."]
        parts += ["### Peak memory by phase, MiB", _grid(memory_view(table))]
        if table.pairs:
            parts += ["### Pairs", _grid(pair_view(table, MAX_PAIRS_IN_TEXT))]
        parts += _failures(table)
    if comparison.problems:
        lines = "\n".join(f"- {_escaped(str(problem))}" for problem in comparison.problems)
        parts += ["## Left out", lines]
    return "\n\n".join(parts) + "\n"


def _table(table: "Table") -> dict[str, Any]:
    return {
        "title": table.title,
        "metric": table.metric,
        "higher_is_better": table.higher_is_better,
        "data_validation": table.digest,
        "examples": table.examples,
        "stand_in": table.is_sample,
        "summary": summary_sentences(table),
        "conditions": [asdict(condition) for condition in table.conditions],
        "groups": _groups(table),
        "best_group": [row.label for row in table.rows if row.in_best_group],
        "arms": [_arm(row) for row in table.rows],
        "pair_count": len(table.pairs),
        "pairs": [_pair(pair) for pair in _listed(table)],
    }


def _groups(table: "Table") -> dict[str, list[str]]:
    """Letter → the arms that share it."""
    found: dict[str, list[str]] = {}
    for row in table.rows:
        for letter in row.letters:
            found.setdefault(letter, []).append(row.label)
    return dict(sorted(found.items()))


def _arm(row: "Row") -> dict[str, Any]:
    return {
        "label": row.label,
        "name": row.arm.name,
        "score": row.score,
        "scores": {str(seed): score for seed, score in row.scores.items()},
        "tested_seeds": list(row.tested_seeds),
        "seed_interval": row.seed_interval and list(row.seed_interval),
        "interval": row.interval and list(row.interval),
        "letters": row.letters,
        "in_best_group": row.in_best_group,
        "conditions": list(row.notes),
        "figures": row.figures.as_json(),
        "recipe": row.arm.recipe,
        "runs": [_run(run, is_superseded=run in row.arm.superseded) for run in _of(row)],
    }


def _of(row: "Row") -> "list[Run]":
    return [*row.arm.runs, *row.arm.superseded]


def _run(run: "Run", *, is_superseded: bool) -> dict[str, Any]:
    record = run.record.model_dump(mode="json", exclude={"recipe"}) if run.record else None
    return {
        "folder": str(run.folder),
        "seed": run.seed,
        "status": run.status,
        "error": run.error,
        "superseded": is_superseded,
        "record": record,
    }


def _listed(table: "Table") -> "list[Pair]":
    """All pairs; of very many those of the best arm and the clearest."""
    if len(table.pairs) <= MAX_PAIRS_IN_JSON:
        return list(table.pairs)
    best = table.pairs.of(next(row.label for row in table.rows if row.interval))
    kept = {(pair.a, pair.b): pair for pair in [*best, *table.pairs.clearest(MAX_PAIRS_IN_JSON)]}
    return list(kept.values())


def _pair(pair: "Pair") -> dict[str, Any]:
    return {
        **vars(pair),
        "interval": list(pair.interval),
        "degrees_of_freedom": pair.degrees_of_freedom
        if isfinite(pair.degrees_of_freedom)
        else None,
        "separated": pair.is_separated,
        "mcnemar": [vars(test) for test in pair.mcnemar],
    }


def _json_lines(value: Any, depth: int = 0) -> Iterator[str]:
    """The levels of document, tables, table and arms on lines of their own; the rest on one."""
    pad = "\n" + " " * (depth + 1)
    if isinstance(value, dict) and depth in (0, 2):
        for place, (key, inner) in enumerate(value.items()):
            yield f"{',' if place else '{'}{pad}{json.dumps(key)}: "
            yield from _json_lines(inner, depth + 1)
        yield f"{pad[:-1]}}}"
    elif isinstance(value, list) and value and depth in (1, 3):
        for place, inner in enumerate(value):
            yield f"{',' if place else '['}{pad}"
            yield from _json_lines(inner, depth + 1)
        yield f"{pad[:-1]}]"
    else:
        yield json.dumps(value, ensure_ascii=False, allow_nan=False)


def _csv_line(table: "Table", row: "Row", run: "Run") -> dict[str, Any]:
    record = run.record
    memory = record.memory if record else {}
    peaks = {
        f"{phase}_{kind}": getattr(memory[phase], kind) if phase in memory else None
        for phase in PHASES
        for kind in KINDS
    }
    predicted = (record.predicted_allocated_bytes if record else None) or {}
    return {
        "table": table.title,
        "method": row.label,
        "seed": run.seed,
        "status": run.status,
        "superseded": run in row.arm.superseded,
        "metric": table.metric,
        "score": None if run in row.arm.superseded else row.scores.get(run.seed),
        **peaks,
        **{f"{phase}_predicted_bytes": predicted.get(phase) for phase in PHASES},
        **_csv_costs(run),
        "folder": str(run.folder),
        "error": run.error,
    }


def _csv_costs(run: "Run") -> dict[str, Any]:
    record = run.record
    seconds = ("load", "tokenise", "train", "train_cpu", "eval", "metered")
    fields = (
        "examples_per_second",
        "tokens_per_second",
        "optimizer_steps",
        "trainable_parameters",
        "total_parameters",
        "delta_bytes",
        "delta",
        "device",
        "mixed_precision",
        "processes",
        "git_commit",
        "stand_in",
    )
    return {
        **{f"{name}_seconds": record and getattr(record.seconds, name) for name in seconds},
        **{name: record and getattr(record, name) for name in fields},
    }


def _conditions(table: "Table") -> list[str]:
    if not table.conditions:
        return ["All runs were made under the same conditions."]
    lines = [
        f"- [{c.letter}] {_escaped(c.condition)}: "
        f"{_escaped(condition_sentence(c.values, len(table.rows)))}"
        for c in table.conditions
    ]
    return ["Conditions that differ or weaken a figure (rows carry the letters):", "\n".join(lines)]


def _failures(table: "Table") -> list[str]:
    lines = [
        f"- {_escaped(row.label)}, seed {run.seed}: {run.status.replace('_', ' ')}: "
        f"{_escaped(reason_of(run))}"
        for row in table.rows
        for run in row.arm.runs
        if not run.is_completed
    ]
    return ["### Not completed", "\n".join(lines)] if lines else []


def _grid(view: View) -> str:
    rules = ["---" if place in view.texts else "---:" for place in range(len(view.headers))]
    lines = [view.headers, rules, *view.rows]
    return "\n".join(f"| {' | '.join(map(_escaped, cells))} |" for cells in lines)


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, in a table as well."""
    return "".join(f"\\{c}" if c in "\\`*_<>[]|#~" else c for c in " ".join(text.split()))
