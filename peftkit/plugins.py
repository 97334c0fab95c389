"""Finding methods and tasks: peftkit's own and those that other packages name by entry point.

Near the bottom of the import order: the recipe, the registry and the command line ask it for
classes by name. A plugin that cannot be imported is named and skipped, never fatal.
"""

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, get_args

from peftkit.errors import UsageError, suggestion
from peftkit.schema import Section

Group = Literal["methods", "tasks"]
GROUPS: tuple[Group, ...] = ("methods", "tasks")
BUILTIN: dict[Group, dict[str, str]] = {
    "methods": {
        "full": "peftkit.methods.full:Full",
        "lora": "peftkit.methods.lora:Lora",
        "peft": "peftkit.methods.peft:Peft",
        "qlora": "peftkit.methods.qlora:Qlora",
        "top_layers": "peftkit.methods.top_layers:TopLayers",
    },
    "tasks": {
        "classification": "peftkit.tasks.classification:Classification",
        "sft": "peftkit.tasks.sft:Sft",
    },
}
"""Name in a recipe's `type` → class. A string, so that listing imports nothing."""


@dataclass(frozen=True)
class PluginInfo:
    """One method or task: where it comes from, and why it cannot be used, if so."""

    group: Group
    name: str
    origin: str
    error: str | None = None


def load(group: Group, name: str) -> type[Any]:
    """The class that implements a method or a task.

    Raises:
        UsageError: unknown name, or a plugin that cannot be imported.
    """
    target = _targets(group).get(name)
    if target is None:
        known = suggestion(name, names(group))
        raise UsageError(f"{group.removesuffix('s')} '{name}' is unknown; {known}")
    found = _import(group, name)
    if isinstance(found, str):
        raise UsageError(f"{group.removesuffix('s')} '{name}' ({_origin(target)}): {found}")
    return found


def names(group: Group) -> list[str]:
    """Names that `load` accepts, sorted; broken plugins are left out."""
    return sorted(n for n in _targets(group) if not isinstance(_import(group, n), str))


def listing() -> list[PluginInfo]:
    """Every method and task, broken ones with their error."""
    rows = []
    for group in GROUPS:
        for name, target in sorted(_targets(group).items()):
            found = _import(group, name)
            error = found if isinstance(found, str) else None
            rows.append(PluginInfo(group, name, _origin(target), error))
    return rows


@cache
def _targets(group: Group) -> dict[str, str | EntryPoint]:
    """Name → import string or entry point; a built-in name cannot be taken over."""
    found: dict[str, str | EntryPoint] = {e.name: e for e in entry_points(group=f"peftkit.{group}")}
    return {**found, **BUILTIN[group]}


@cache
def _import(group: Group, name: str) -> type[Any] | str:
    """The class, or one line that says what is wrong with it."""
    target = _targets(group)[name]
    try:
        if isinstance(target, EntryPoint):
            found = target.load()
        else:
            module, _, attribute = target.partition(":")
            found = getattr(import_module(module), attribute)
    except (Exception, SystemExit) as error:  # a stranger's package may fail in any way
        reason = " ".join(str(error).split())
        return f"cannot be imported: {type(error).__name__}: {reason}"
    return _defect(found, name) or found


def _defect(found: Any, name: str) -> str | None:
    config = getattr(found, "Config", None)
    if not (isinstance(config, type) and issubclass(config, Section)):
        return "has no Config that derives from peftkit.schema.Section"
    field = config.model_fields.get("type")
    if field is None or get_args(field.annotation) != (name,):
        return f"its Config lacks the field `type: Literal['{name}']`"
    return None


def _origin(target: str | EntryPoint) -> str:
    if isinstance(target, str):
        return "peftkit"
    return target.dist.name if target.dist else "unknown package"
