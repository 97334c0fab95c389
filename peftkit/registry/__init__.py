"""The registry of deltas: what each fine-tune changed, under a name and a version.

Above `modeling`, below `experiment` and `cli`. Importing this package loads no tensor library.
"""

from typing import TYPE_CHECKING

from peftkit.registry.root import default_root, root_problem
from peftkit.registry.store import DeltaInfo, Registry, RunSummary, StoredDelta

if TYPE_CHECKING:
    from peftkit.registry.loading import LoadedDelta

__all__ = [
    "DeltaInfo",
    "Registry",
    "RunSummary",
    "StoredDelta",
    "default_root",
    "load",
    "root_problem",
]


def load(reference: str, *, registry: Registry | None = None) -> "LoadedDelta":
    """Base and delta as a model that answers, every byte verified.

    Args:
        reference: `name`, `name@v2`, `name@TAG` or `name@sha256:…`.
        registry: By default the one in `$PEFTKIT_REGISTRY`, else `./registry`.

    Raises:
        RegistryError: unknown, damaged, or another base or tokenizer than it was trained on.
        SourceError: the base cannot be found.
    """
    from peftkit.registry.loading import load_delta

    return load_delta(reference, registry=registry)
