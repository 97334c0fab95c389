"""The per-example predictions of a run, kept so that two methods can be tested on them.

Written by the experiment; one Parquet row an example, in the order of the split.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from peftkit.staging import STAGING_PREFIX, fsync_path

if TYPE_CHECKING:
    import numpy as np


def write_predictions(path: Path, columns: "dict[str, np.ndarray]") -> None:
    """Write `columns`, each (N,) or (N, C); a second dimension becomes a list an example."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({name: column.tolist() for name, column in columns.items()})
    temporary = path.with_name(f"{STAGING_PREFIX}{path.name}")
    pq.write_table(table, temporary)
    fsync_path(temporary)
    os.replace(temporary, path)
