"""The per-example predictions of a run, kept so that two methods can be tested on them.

Written by the experiment, read by the comparison; one Parquet row an example, in the order of the
split.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from peftkit.errors import RunError
from peftkit.staging import STAGING_PREFIX, fsync_path

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


def write_predictions(path: Path, columns: "dict[str, np.ndarray]") -> None:
    """Write `columns`, each (N,) or (N, C); a second dimension becomes a list an example."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({name: column.tolist() for name, column in columns.items()})
    temporary = path.with_name(f"{STAGING_PREFIX}{path.name}")
    pq.write_table(table, temporary)
    fsync_path(temporary)
    os.replace(temporary, path)


def read_predictions(path: Path) -> "dict[str, np.ndarray]":
    """Columns of numbers, each (N,); lists an example, such as logits, are left out.

    Raises:
        RunError: no such file, no whole Parquet file, or no column of numbers without gaps.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # A `Path` alone would go through pyarrow's file systems, at four times the time.
        with path.open("rb") as source:
            file = pq.ParquetFile(source)
            names = [f.name for f in file.schema_arrow if _is_number(f.type)]
            table = file.read(columns=names, use_threads=False)
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror or error}") from None
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"{path}: not a whole Parquet file: {reason}") from None
    full = [name for name in names if table.num_rows and not table[name].null_count]
    columns = {name: _numbers(table[name]) for name in full}
    if not columns:
        raise RunError(f"{path}: holds no predictions; run the experiment again")
    return columns


def _is_number(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    types = pa.types
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind))


def _numbers(column: "pa.ChunkedArray") -> "np.ndarray":
    # By way of DLPack, because pyarrow's own `to_numpy` imports pandas, a second's work.
    import numpy as np
    import pyarrow as pa

    numbers = column.cast(pa.int8()) if pa.types.is_boolean(column.type) else column
    return np.concatenate([np.from_dlpack(chunk) for chunk in numbers.chunks])
