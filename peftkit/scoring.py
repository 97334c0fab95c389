"""Scoring stored deltas on the validation split of their task.

Called by the verbs `evaluate` and `merge --evaluate`. The model runs in the mixed precision that it
was trained in, so that the same inputs give the same numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peftkit.errors import DataError
from peftkit.registry.loading import LoadedDelta, loaded_delta
from peftkit.registry.manifest import DeltaInfo
from peftkit.registry.store import Registry, StoredDelta

if TYPE_CHECKING:
    from accelerate import Accelerator
