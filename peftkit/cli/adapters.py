"""The verbs below `adapters` that look and name: ls, show, path, tag, rm.

Called by `cli.app`; imports the registry inside each verb and no tensor library.
"""

import json
import operator
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftkit.cli.output import JsonFlag, megabytes, note, print_json, print_pairs, print_table
from peftkit.errors import RegistryError, UsageError

if TYPE_CHECKING:
    from peftkit.registry import DeltaInfo, StoredDelta

COLUMNS = ("name", "version", "tags", "method", "task", "base", "metrics", "size", "created")
SORT_KEYS = ("name", "created", "size")

_CONDITION = re.compile(r"([A-Za-z0-9_.-]+?)\s*(>=|<=|>|<|=)\s*(-?[0-9.]+(?:e-?[0-9]+)?)")
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "=": operator.eq,
}

Name = Annotated[str, typer.Argument(metavar="NAME", help="name, name@v2 or name@TAG.")]


def add_to(group: typer.Typer) -> None:
    """Register the verbs below `adapters`."""
    example = "Example: peftkit adapters"
    group.command("ls", epilog=f"{example} ls --task sst2 --sort accuracy")(list_adapters)
    group.command("show", epilog=f"{example} show lora-sst2@v1")(show_adapter)
    group.command("path", epilog=f"{example} path lora-sst2")(print_path)
    group.command("tag", epilog=f"{example} tag lora-sst2@v3 best")(tag_adapter)
    group.command("rm", epilog=f"{example} rm lora-sst2@v1")(remove_adapter)


def list_adapters(
    *,
    base: Annotated[str | None, typer.Option(help="Only bases whose name holds this.")] = None,
    task: Annotated[str | None, typer.Option(help="Only tasks whose name holds this.")] = None,
    method: Annotated[str | None, typer.Option(help="Only this method.")] = None,
    metric: Annotated[str | None, typer.Option(help="Only scores such as 'accuracy>=0.9'.")] = None,
    sort: Annotated[
        str, typer.Option(help="name, created, size or a metric; all but name fall.")
    ] = "name",
    as_json: JsonFlag = False,
) -> None:
    """List the registry.

    That is $PEFTKIT_REGISTRY, else ./registry. Unreadable versions are named, and exit 1.
    """
    from peftkit.registry import Registry, default_root

    score = _metric_filter(metric)
    listing = Registry(default_root()).ls()
    rows = [
        row
        for row in listing.rows
        if (base or "") in row["base"]
        and (task or "") in row["task"]
        and method in (None, row["method"])
        and score(row["metrics"])
    ]
    rows = _sorted(rows, sort)
    if as_json:
        print_json(rows)
    elif rows:
        print_table(COLUMNS, [_row(row) for row in rows])
    else:
        matching = " that match" if listing.rows else ""
        note(f"no deltas in {default_root()}{matching}")
    if listing.problems:
        raise RegistryError(listing.problems)


def show_adapter(name: Name, *, as_json: JsonFlag = False) -> None:
    """Show one delta.

    What it is, what it belongs to and where it comes from. Its files are not verified.
    """
    from peftkit.registry.summary import summary_of

    stored, tags = _found(name)
    if as_json:
        info = stored.info.model_dump(mode="json")
        files = {name: str(file) for name, file in stored.files.items()}
        shown = {**summary_of(stored), "path": str(stored.path), "tags": tags}
        print_json({**shown, "files": files, "info": info})
    else:
        print_pairs(_description(stored, tags))


def print_path(name: Name) -> None:
    """Print the folder of a delta.

    A read-only folder of links that PEFT, vLLM or a person opens. The files of `weights` deltas are
    peftkit's own. The files are not verified.
    """
    print(_found(name)[0].path)


def tag_adapter(
    name: Name,
    tag: Annotated[str, typer.Argument(metavar="TAG", help="Such as best or production.")],
    *,
    force: Annotated[bool, typer.Option("--force", help="Move a tag that is set.")] = False,
    delete: Annotated[bool, typer.Option("--delete", help="Take the tag away.")] = False,
) -> None:
    """Name a version.

    `name@TAG` then means it wherever a name is asked for.
    """
    from peftkit.registry import Registry, default_root

    registry = Registry(default_root())
    if delete:
        registry.untag(name.partition("@")[0], tag)
        print(f"{name.partition('@')[0]}@{tag} removed")
    else:
        stored = registry.tag(name, tag, move=force)
        print(f"{stored.name}@{tag} is {stored}")


def remove_adapter(
    name: Name,
    *,
    every: Annotated[bool, typer.Option("--all", help="Every version of the name.")] = False,
) -> None:
    """Remove a version and its tags.

    Its blobs stay until `peftkit adapters gc`; its number is never used again.
    """
    from peftkit.registry import Registry, default_root

    registry = Registry(default_root())
    if "@" not in name and not every and len(registry.lookup.versions_of(name)) > 1:
        raise UsageError(f"{name}: has several versions; name one such as {name}@v1, or add --all")
    for removed in registry.rm(name):
        print(f"{removed} removed")


def _found(name: str) -> "tuple[StoredDelta, list[str]]":
    from peftkit.registry import Registry, default_root

    registry = Registry(default_root())
    stored = registry.find(name)
    tags = registry.tags.of(stored.name).items()
    return stored, [tag for tag, version in tags if f"v{version.number}" == stored.version]


def _metric_filter(condition: str | None) -> Callable[[dict[str, float | None]], bool]:
    if condition is None:
        return lambda metrics: True
    parsed = _CONDITION.fullmatch(condition.strip())
    try:
        wanted = float(parsed[3]) if parsed else None
    except ValueError:
        wanted = None
    if parsed is None or wanted is None:
        raise UsageError(f"--metric {condition!r}: expected a condition such as 'accuracy>=0.9'")
    key, holds, bound = parsed[1], _COMPARISONS[parsed[2]], wanted

    def fits(metrics: dict[str, float | None]) -> bool:
        value = metrics.get(key)
        return value is not None and holds(value, bound)

    return fits


def _sorted(rows: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    if key == "name":
        return rows
    metrics = sorted({metric for row in rows for metric in row["metrics"]})
    if key not in (*SORT_KEYS, *metrics):
        raise UsageError(f"--sort {key!r}: expected one of {', '.join((*SORT_KEYS, *metrics))}")
    field = {"size": "bytes"}.get(key, key)

    def rank(row: dict[str, Any]) -> tuple[bool, Any]:
        value = row[field] if key in SORT_KEYS else row["metrics"].get(key)
        return value is not None, value if value is not None else 0

    return sorted(rows, key=rank, reverse=True)


def _row(row: dict[str, Any]) -> list[str]:
    sample = " (sample)" if row["stand_in"] else ""
    plain = [str(row[column]) for column in ("name", "version")]
    return [
        *plain,
        ", ".join(row["tags"]),
        str(row["method"]),
        row["task"] + sample,
        row["base"],
        _metrics(row["metrics"]),
        megabytes(row["bytes"]),
        str(row["created"]),
    ]


def _description(stored: "StoredDelta", tags: list[str]) -> list[tuple[str, str]]:
    info = stored.info
    quantised = info.quantisation.quant_type if info.quantisation else "no"
    pairs = [
        ("name", str(stored)),
        ("tags", ", ".join(tags) or "-"),
        ("digest", stored.digest),
        ("path", str(stored.path)),
        ("kind", info.kind),
        *_settings("method", info.method),
        *_settings("task", info.task),
        ("labels", ", ".join(info.labels or []) or "-"),
        ("base", f"{info.base_name} (revision {info.base_revision or 'default'})"),
        ("base digest", info.base_digest),
        ("quantised base", quantised),
        ("tokenizer digest", info.tokenizer_digest),
        ("metrics", _metrics(info.run.metrics)),
        ("trained on", "a sample that peftkit made" if info.stand_in else "the named data"),
        ("run", f"{info.run.record} (seed {info.run.seed}, {info.run.status})"),
        ("recipe digest", info.recipe_digest),
        *_origin(info),
        ("created", info.created),
    ]
    files = sorted(stored.files.items())
    return pairs + [(f"file {name}", str(file)) for name, file in files]


def _origin(info: "DeltaInfo") -> list[tuple[str, str]]:
    """What a combined or extracted delta was made of, and how it was verified."""
    found = [
        ("parent", f"{parent.reference}, weight {parent.weight:g} ({parent.digest})")
        for parent in info.parents
    ]
    if verified := info.verification:
        distance = f"max |Δlogit| {verified.max_abs_difference:.1e} over {verified.rows} texts"
        found.append(("verified", f"{distance}, KL {verified.kl_divergence:.1e}"))
    return found


def _metrics(metrics: dict[str, float | None]) -> str:
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
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return json.dumps(value, ensure_ascii=False) if "\n" in str(value) else str(value)
