"""The verbs `adapters ls` and `adapters show`: what the registry holds.

Called by `cli.app`; imports the registry inside each verb and no tensor library.
"""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftkit.cli.output import JsonFlag, megabytes, note, print_json, print_pairs, print_table
from peftkit.errors import RegistryError

if TYPE_CHECKING:
    from peftkit.registry import StoredDelta

COLUMNS = ("name", "version", "method", "task", "base", "metrics", "size", "created")


def add_to(app: typer.Typer) -> None:
    """Register the verbs below `adapters`."""
    group = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="The stored deltas.")
    group.command("ls", epilog="Example: peftkit adapters ls --json")(list_adapters)
    group.command("show", epilog="Example: peftkit adapters show lora-sst2@v1")(show_adapter)
    app.add_typer(group, name="adapters")


def list_adapters(*, as_json: JsonFlag = False) -> None:
    """List the registry.

    That is $PEFTKIT_REGISTRY, else ./registry. Unreadable versions are named, and exit 1.
    """
    from peftkit.registry import Registry, default_root

    scan = Registry(default_root()).scan()
    if as_json:
        print_json([_summary(delta) for delta in scan.deltas])
    elif scan.deltas:
        print_table(COLUMNS, [_row(delta) for delta in scan.deltas])
    else:
        note(f"no deltas in {default_root()}")
    if scan.problems:
        raise RegistryError(scan.problems)


def show_adapter(
    name: Annotated[str, typer.Argument(metavar="NAME", help="name, or name@v2.")],
    *,
    as_json: JsonFlag = False,
) -> None:
    """Show one delta.

    What it is, what it belongs to and where it comes from. Its files are not verified.
    """
    from peftkit.registry import Registry, default_root

    stored = Registry(default_root()).find(name)
    if as_json:
        print_json({**_summary(stored), "info": stored.info.model_dump(mode="json")})
    else:
        print_pairs(_description(stored))


def _summary(stored: "StoredDelta") -> dict[str, Any]:
    return {
        "name": stored.name,
        "version": stored.version,
        "path": str(stored.path),
        "kind": stored.info.kind,
        "method": stored.info.method.get("type"),
        "task": _task_name(stored),
        "base": stored.info.base_name,
        "metrics": stored.info.run.metrics,
        "stand_in": stored.info.stand_in,
        "bytes": sum(file.size for file in stored.files.values()),
        "created": stored.info.created,
        "files": {name: file.sha256 for name, file in stored.files.items()},
    }


def _row(stored: "StoredDelta") -> list[str]:
    found = _summary(stored)
    plain = [str(found[column]) for column in ("name", "version", "method", "task", "base")]
    return [*plain, _metrics(stored), megabytes(found["bytes"]), str(found["created"])]


def _description(stored: "StoredDelta") -> list[tuple[str, str]]:
    info = stored.info
    quantised = info.quantisation.quant_type if info.quantisation else "no"
    pairs = [
        ("name", f"{stored.name}@{stored.version}"),
        ("path", str(stored.path)),
        ("kind", info.kind),
        *_settings("method", info.method),
        *_settings("task", info.task),
        ("labels", ", ".join(info.labels or []) or "-"),
        ("base", f"{info.base_name} (revision {info.base_revision or 'default'})"),
        ("base digest", info.base_digest),
        ("quantised base", quantised),
        ("tokenizer digest", info.tokenizer_digest),
        ("metrics", _metrics(stored)),
        ("trained on", "a sample that peftkit made" if info.stand_in else "the named data"),
        ("run", f"{info.run.record} (seed {info.run.seed}, {info.run.status})"),
        ("recipe digest", info.recipe_digest),
        ("created", info.created),
    ]
    files = sorted(stored.files.items())
    return pairs + [(f"file {name}", str(file)) for name, file in files]


def _task_name(stored: "StoredDelta") -> str:
    task = stored.info.task
    words = (task.get("type"), task.get("dataset"), task.get("dataset_config"))
    sample = " (sample)" if stored.info.stand_in else ""
    return " ".join(str(word) for word in words if word) + sample


def _metrics(stored: "StoredDelta") -> str:
    metrics = stored.info.run.metrics
    shown = (f"{name} {'-' if v is None else format(v, '.4f')}" for name, v in metrics.items())
    return ", ".join(shown) or "-"


def _settings(title: str, section: dict[str, Any]) -> list[tuple[str, str]]:
    """The section's type, then a line for each key that says something."""
    rest = {key: value for key, value in section.items() if key != "type"}
    said = {
        key: value for key, value in rest.items() if value is not None and value not in ([], {})
    }
    lines = [(f"  {key}", _plain(value)) for key, value in said.items()]
    return [(title, str(section.get("type", "-"))), *lines]


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
