"""What a listing shows of a delta, as plain values.

Called by the store's index; the CLI prints and filters it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftkit.registry.store import StoredDelta


def summary_of(stored: "StoredDelta") -> dict[str, Any]:
    """The values of one line of a listing."""
    info = stored.info
    return {
        "name": stored.name,
        "version": stored.version,
        "digest": stored.digest,
        "kind": info.kind,
        "method": info.method.get("type"),
        "task": task_name(info.task),
        "base": info.base_name,
        "metrics": info.run.metrics,
        "stand_in": info.stand_in,
        "bytes": sum(file.size for file in stored.files.values()),
        "created": info.created,
    }


def task_name(task: dict[str, Any]) -> str:
    """The type of a task with its data set, such as `classification nyu-mll/glue cola`."""
    words = (task.get("type"), task.get("dataset"), task.get("dataset_config"))
    return " ".join(str(word) for word in words if word)
