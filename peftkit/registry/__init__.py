"""The registry of deltas: what each fine-tune changed, under a name and a version.

Above `modeling`, below `experiment` and `cli`. Importing this package loads no tensor library.
"""

from peftkit.registry.root import default_root, root_problem
from peftkit.registry.store import DeltaInfo, Registry, RunSummary, StoredDelta

__all__ = [
    "DeltaInfo",
    "Registry",
    "RunSummary",
    "StoredDelta",
    "default_root",
    "root_problem",
]
