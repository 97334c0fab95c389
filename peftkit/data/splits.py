"""Read the parts of a data set from files, keep them apart, and give their rows an identity.

Called by `sources` and the tasks; imports only `errors`, and pyarrow and datasets where a file is
read.
"""

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.errors import DataError, SourceError

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

Row = Mapping[str, Any]
Key = Callable[[Row], str | Sequence[str]]
"""The text or texts by which two rows count as the same example."""

_NO_SPLITS = {"dataset_info", "dataset_infos", "dataset_dict", "state"}


def split_files(folder: Path) -> dict[str, list[Path]]:
    """Split → its files by their stems; more than one file is for `read_split` to refuse.

    Raises:
        SourceError: the folder holds no file of data.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in _TABLES and path.stem not in _NO_SPLITS and path.is_file():
            found.setdefault(path.stem, []).append(path)
    if not found:
        configs = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
        hint = f"; if one of its folders is meant ({configs}), name the config" if configs else ""
        forms = "<split>.parquet, <split>.jsonl, <split>.json or <split>.csv"
        raise SourceError(f"{folder}: holds no data; expected {forms}{hint}")
    return found


def read_split(files: Sequence[Path]) -> "datasets.Dataset":
    """The rows of a split's one file, in memory; class names in a parquet file are kept.

    Raises:
        SourceError: several files, a file that cannot be read (with the line, if it has lines), or
            one without rows.
    """
    import pyarrow as pa
    from datasets import Dataset

    path, *others = files
    if others:
        names = ", ".join(file.name for file in files)
        raise SourceError(f"{path.parent}: {names} are all the split '{path.stem}'; keep one")
    try:
        table = _TABLES[path.suffix](path)
        table.validate(full=True)
        if twice := {n for n in table.column_names if table.column_names.count(n) > 1}:
            raise ValueError(f"duplicate columns {', '.join(sorted(twice))}")
        dataset = Dataset(table)
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise SourceError(f"{path}: not readable as {path.suffix[1:]}: {reason}") from error
    if not dataset.num_rows:
        raise SourceError(f"{path}: holds no rows")
    return dataset


def normalised(text: str) -> str:
    """NFKC, case folded, whitespace collapsed: what two copies of a sentence have in common.

    >>> normalised("  Ｇreat   FILM ")
    'great film'
    """
    # Folding can leave NFKC ("ǰ" folds to two code points), so it is composed a second time.
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def remove_overlap(
    train_rows: Iterable[Row], other_rows: Iterable[Row], key: Key
) -> tuple[list[Row], int]:
    """Rows of train whose text is in no other split, in order, and how many were removed.

    A row with two texts (a sentence pair) is a copy only if both are equal, in the same order.
    """
    train = list(train_rows)
    seen = {row_identity(row, key) for row in other_rows}
    kept = [row for row in train if row_identity(row, key) not in seen]
    return kept, len(train) - len(kept)


def rows_digest(rows: Iterable[Row]) -> str:
    """`sha256:…` over the rows in order, each as JSON with sorted keys.

    Column order and the library that read the rows do not matter; row order and types do.
    """
    digest = hashlib.sha256()
    for row in rows:
        text = json.dumps(dict(row), sort_keys=True, separators=(",", ":"), default=_plain)
        digest.update(text.encode("ascii") + b"\n")
    return f"sha256:{digest.hexdigest()}"


def row_identity(row: Row, key: Key | None) -> tuple[str, ...]:
    """The normalised texts by which a row is known; without a key, of all its string columns."""
    texts = (key or _all_texts)(row)
    return tuple(normalised(text) for text in ([texts] if isinstance(texts, str) else texts))


def _all_texts(row: Row) -> list[str]:
    return [row[name] for name in sorted(row) if isinstance(row[name], str)]


def _plain(value: Any) -> Any:
    """A JSON value for what tables hold beyond JSON: numpy scalars and arrays, dates, bytes."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if isinstance(value, bytes):
        return f"bytes:{value.hex()}"
    raise DataError(f"rows: a value of type {type(value).__name__} has no digest; use plain types")


def _parquet_table(path: Path) -> "pa.Table":
    import pyarrow.parquet

    # A plain file object: `read_table(path)` would also take folder names such as `x=1` as columns.
    with path.open("rb") as stream:
        return pyarrow.parquet.read_table(stream)


def _csv_table(path: Path) -> "pa.Table":
    import pyarrow as pa
    from pyarrow import csv

    data = path.read_bytes()
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SourceError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from error
    # One block, or types would be guessed from the first megabyte alone.
    whole = csv.ReadOptions(block_size=len(data) + 1)
    parse = csv.ParseOptions(newlines_in_values=True)
    return csv.read_csv(pa.BufferReader(data), whole, parse)


def _json_table(path: Path) -> "pa.Table":
    rows = json.loads(path.read_bytes())
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise SourceError(f"{path}: holds no list of objects; one object per line is .jsonl")
    return _columns(path, rows)


def _jsonl_table(path: Path) -> "pa.Table":
    rows = []
    # Split at "\n" only: other line ends may stand inside a JSON string.
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            rows.append(_json_object(f"{path}:{number}", line))
    return _columns(path, rows)


def _json_object(where: str, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: not a JSON object: {error}") from error
    if not isinstance(value, dict):
        raise SourceError(f"{where}: not a JSON object: found {type(value).__name__}")
    return value


def _columns(path: Path, rows: list[dict[str, Any]]) -> "pa.Table":
    """One column for every key of any row; pyarrow alone keeps those of the first row."""
    import pyarrow as pa

    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        try:
            columns[name] = pa.array([row.get(name) for row in rows])
        except (pa.ArrowException, ValueError, OverflowError) as error:
            reason = " ".join(str(error).split())
            raise SourceError(f"{path}: column '{name}' has no single type: {reason}") from error
    return pa.table(columns)


_TABLES: dict[str, Callable[[Path], "pa.Table"]] = {
    ".parquet": _parquet_table,
    ".jsonl": _jsonl_table,
    ".json": _json_table,
    ".csv": _csv_table,
}
