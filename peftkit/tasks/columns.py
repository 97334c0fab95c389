"""Texts and labels out of the columns of a data set, with every misfit in one list.

Called by `classification`; imports only `errors`, so that recipes can be checked cheaply.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftkit.errors import suggestion

if TYPE_CHECKING:
    from datasets import Dataset

TextRow = dict[str, Any]
"""`texts`: one string a text column, "" where there is none; `label`: class id or number;
`source_row`: place of the row in its split as it was read, from 0."""

SHOWN = 5
"""Different wrong labels that are named one by one."""


@dataclass(frozen=True)
class Columns:
    """Which columns hold what; `labels` are names in id order, or None to take the data's own."""

    texts: Sequence[str]
    label: str
    labels: Sequence[str] | None
    regression: bool


@dataclass(frozen=True)
class Parsed:
    """The rows of each split, usable if `problems` is empty."""

    rows: dict[str, list[TextRow]]
    label_names: list[str] | None
    problems: list[str]


def parse(splits: "Mapping[str, Dataset]", columns: Columns) -> Parsed:
    """Read every split; the first one is the training split, which settles the label map.

    Integer labels are ids where `labels` or a ClassLabel feature names them. Else the distinct
    integers in ascending order are the classes, each named `LABEL_<integer>`.
    """
    problems = [line for name in splits for line in _structure(name, splits[name], columns)]
    texts = {name: _texts(name, data, columns, problems) for name, data in splits.items()}
    labelled = {n: _plain(d, columns.label) for n, d in splits.items() if _has(d, columns.label)}
    labels: dict[str, list[Any]]
    if columns.regression:
        names = None
        labels = {n: _numbers(_at(n, columns), values, problems) for n, values in labelled.items()}
    else:
        ids, names = _label_map(splits, labelled, columns, problems=problems)
        labels = {n: _ids(_at(n, columns), v, ids, problems=problems) for n, v in labelled.items()}
    if problems:
        return Parsed({}, names, problems)
    rows = {
        split: [
            {"texts": list(text), "label": label, "source_row": number}
            for number, (text, label) in enumerate(zip(texts[split], labels[split], strict=True))
        ]
        for split in splits
    }
    return Parsed(rows, names, [])


def _structure(split: str, data: "Dataset", columns: Columns) -> list[str]:
    if not len(data):
        return [f"{split}: the split has no rows"]
    missing = [name for name in (*columns.texts, columns.label) if not _has(data, name)]
    return [
        f"{split}: no column '{name}'; {suggestion(name, data.column_names)}" for name in missing
    ]


def _texts(
    split: str, data: "Dataset", columns: Columns, problems: list[str]
) -> list[tuple[str, ...]]:
    found = [_column(split, data, name, problems) for name in columns.texts if _has(data, name)]
    return list(zip(*found, strict=True))


def _column(split: str, data: "Dataset", name: str, problems: list[str]) -> list[str]:
    values = ["" if value is None else value for value in _plain(data, name)]
    strange = [row for row, value in enumerate(values) if not isinstance(value, str)]
    if strange:
        value = values[strange[0]]
        problems.append(
            f"{split}: column '{name}': {_rows(len(strange))} without text, the first is row "
            f"{strange[0]} with {type(value).__name__} {value!r}; a text column holds strings"
        )
    elif values and not any(value.strip() for value in values):
        problems.append(f"{split}: column '{name}': all {len(values)} texts are empty")
    return values


def _label_map(
    splits: "Mapping[str, Dataset]",
    labelled: Mapping[str, list[Any]],
    columns: Columns,
    *,
    problems: list[str],
) -> tuple[dict[Any, int] | None, list[str] | None]:
    """Raw label → id, and the names in id order; both None if the labels cannot be settled."""
    before = len(problems)
    own = [names for data in splits.values() if (names := _class_names(data, columns.label))]
    if own:
        _check_class_names(own, columns, problems)
    train = next(iter(splits))
    if columns.labels or own:
        names = list(columns.labels or own[0])
        ids = {name: number for number, name in enumerate(names)} | {
            number: number for number in range(len(names))
        }
        return (ids, names) if len(problems) == before else (None, None)
    if not labelled.get(train):
        return None, None
    distinct = _distinct_integers(_at(train, columns), labelled[train], problems)
    if distinct is None:
        return None, None
    return {value: i for i, value in enumerate(distinct)}, [f"LABEL_{value}" for value in distinct]


def _check_class_names(own: list[list[str]], columns: Columns, problems: list[str]) -> None:
    """Two orders of the same names would swap labels without a sound."""
    if any(names != own[0] for names in own):
        problems.append(f"column '{columns.label}': the splits order or name their labels unlike")
    given = columns.labels
    if given and (
        len(given) != len(own[0]) or (sorted(given) == sorted(own[0]) and list(given) != own[0])
    ):
        problems.append(
            f"labels: {', '.join(given)}, but the ids of column '{columns.label}' stand for "
            f"{', '.join(own[0])}; give as many labels in that order, or leave `labels` out"
        )


def _distinct_integers(where: str, values: list[Any], problems: list[str]) -> list[int] | None:
    others = [value for value in values if not isinstance(value, int)]
    if not others:
        distinct = sorted({int(value) for value in values})
        if len(distinct) > 1:
            return distinct
        problems.append(f"{where}: every label is {distinct[0]}; two labels at least are needed")
    elif all(isinstance(value, str) for value in others):
        found = ", ".join(sorted(set(others))[: 2 * SHOWN])
        problems.append(f"{where}: labels are strings; list them in `labels`, in id order: {found}")
    elif None in others:
        missing = [row for row, value in enumerate(values) if value is None]
        problems.append(
            f"{where}: {_rows(len(missing))} without a label, the first is row {missing[0]}"
        )
    else:
        problems.append(
            f"{where}: labels are integers or strings, found {others[0]!r} in row "
            f"{values.index(others[0])}; set `problem: regression` if they are numbers to predict"
        )
    return None


def _ids(
    where: str, values: list[Any], ids: Mapping[Any, int] | None, *, problems: list[str]
) -> list[int]:
    if ids is None:
        return []
    wrong: dict[str, list[int]] = {}  # by its repr: a label may be a list, or one of many NaN
    for row, value in enumerate(values):
        if not isinstance(value, int | float | str) or value not in ids:
            wrong.setdefault(repr(value), []).append(row)
    known = ", ".join(str(value) for value in ids)
    problems += [
        f"{where}: {value} in {_rows(len(rows))}, first in row {rows[0]}, is not a label; "
        f"labels are {known}" + (" (-1 is often a hidden label)" if value == "-1" else "")
        for value, rows in list(wrong.items())[:SHOWN]
    ]
    if len(wrong) > SHOWN:
        problems.append(f"{where}: and {len(wrong) - SHOWN} more values that are not labels")
    return [] if wrong else [ids[value] for value in values]


def _numbers(where: str, values: list[Any], problems: list[str]) -> list[float]:
    wrong = [row for row, value in enumerate(values) if not _is_number(value)]
    if wrong:
        problems.append(
            f"{where}: {_rows(len(wrong))} without a finite number, the first is row {wrong[0]} "
            f"with {values[wrong[0]]!r}; a regression needs a number in every row"
        )
        return []
    return [float(value) for value in values]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _class_names(data: "Dataset", column: str) -> list[str] | None:
    return getattr(data.features.get(column), "names", None)


def _has(data: "Dataset", column: str) -> bool:
    return column in data.column_names


def _plain(data: "Dataset", column: str) -> list[Any]:
    return list(data[column][:])


def _at(split: str, columns: Columns) -> str:
    return f"{split}: column '{columns.label}'"


def _rows(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"
