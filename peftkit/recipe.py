"""A recipe: base + task + method + training, loaded once, frozen, with readable errors.

Called by `run` and the command line. The sections are defined beside the code that they
configure; this module only puts them together and words what is wrong with them.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Self, Union

import yaml
from pydantic import (
    BaseModel,
    Field,
    SerializeAsAny,
    ValidationError,
    create_model,
    model_validator,
)

from peftkit import plugins, yaml_source
from peftkit.errors import RecipeError, UsageError, suggestion
from peftkit.modeling.base import BaseConfig
from peftkit.plugins import Group
from peftkit.schema import Section
from peftkit.training.config import TrainingConfig
from peftkit.yaml_source import Document

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"

_GROUPS: dict[str, Group] = {"task": "tasks", "method": "methods"}


class Recipe(Section):
    """One experiment. `task` and `method` are sections of the class that their `type` names."""

    name: str = Field(pattern=NAME_PATTERN)
    """Name of the run's folder and of the delta in the registry; the default is the file's."""
    base: BaseConfig
    task: SerializeAsAny[Section]
    method: SerializeAsAny[Section]
    training: TrainingConfig
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Draws the held-out part, the head's initial weights, the batches and the dropout."""
    output_dir: str = "runs"
    """The run's folder is `<output_dir>/<name>-seed<seed>`."""

    @model_validator(mode="after")
    def _best_metric_is_measured(self) -> Self:
        name = self.training.metric_for_best_model
        task_type = getattr(self.task, "type", None)
        if name is None or task_type is None:
            return self
        known = ["loss", *plugins.load("tasks", task_type)(self.task).metric_names]
        if name not in known:
            raise ValueError(
                f"training.metric_for_best_model: '{name}' is no metric of the task; "
                f"{suggestion(name, known)}"
            )
        return self

    @property
    def run_folder(self) -> Path:
        """Where the run keeps its record, predictions, log and checkpoints."""
        return Path(self.output_dir) / f"{self.name}-seed{self.seed}"

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, defaults included, as plain JSON types."""
        return self.model_dump(mode="json")

    def digest(self) -> str:
        """`sha256:…` of what the run computes: not of its name or folder."""
        content = self.resolved()
        for key in ("name", "output_dir"):
            content.pop(key)
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides (`training.learning_rate=5e-4`).

    Raises:
        RecipeError: every problem of the file and the overrides, one line each.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise RecipeError(f"{path}: cannot be read: {reason}") from error
    document = yaml_source.parse(text, str(path))
    if not isinstance(document.value, dict):
        raise RecipeError(f"{path}: must be a mapping with the keys base, task, method, training")
    origins = _apply(document.value, overrides)
    document.value.setdefault("name", re.sub(r"[^a-z0-9._-]", "_", path.stem.lower()))
    return _validate(document, origins, path)


def from_resolved(content: dict[str, Any]) -> Recipe:
    """The recipe that `Recipe.resolved` described, e.g. in a stored delta.

    Raises:
        RecipeError: it does not fit this version of peftkit or its plugins.
    """
    return _validate(Document(content, {}), {}, Path("stored recipe"))


def resolved_yaml(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults included."""
    return yaml.safe_dump(recipe.resolved(), sort_keys=False, allow_unicode=True)


def recipe_model() -> type[BaseModel]:
    """The recipe with every installed task and method: the source of its JSON Schema."""
    return _model(*(_union(group) for group in _GROUPS.values()))


def _union(group: Group) -> Any:
    configs = [plugins.load(group, name).Config for name in plugins.names(group)]
    if len(configs) == 1:
        return configs[0]
    return Annotated[Union[tuple(configs)], Field(discriminator="type")]  # noqa: UP007


@cache
def _model(task: Any, method: Any) -> type[Recipe]:
    return create_model("Recipe", __base__=Recipe, task=(task, ...), method=(method, ...))


def _apply(content: dict[str, Any], overrides: Sequence[str]) -> dict[tuple[str, ...], str]:
    """Set overridden values in place; returns which override set which key."""
    origins: dict[tuple[str, ...], str] = {}
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = tuple(key.split("."))
        if not equals or not all(parts):
            problems.append(f"override '{override}': must be key=value, e.g. training.max_steps=10")
            continue
        try:
            value = yaml_source.parse(text, f"override '{override}'").value
        except RecipeError as error:
            problems += error.problems
            continue
        section: Any = content
        for part in parts[:-1]:
            section = section.setdefault(part, {}) if isinstance(section, dict) else None
        if not isinstance(section, dict):
            problems.append(f"override '{override}': '{key}' is not inside a section")
            continue
        section[parts[-1]] = value
        origins[parts] = f"override '{override}'"
    if problems:
        raise RecipeError(problems)
    return origins


def _validate(document: Document, origins: dict[tuple[str, ...], str], path: Path) -> Recipe:
    """Validate every section, wording all problems at once."""
    configs: dict[str, Any] = {}
    problems: list[tuple[int, str]] = []
    wording = _Wording(document, origins, path)
    for section, group in _GROUPS.items():
        content = document.value.get(section)
        named = content.get("type") if isinstance(content, dict) else None
        configs[section] = Any
        try:
            if isinstance(content, dict):
                configs[section] = plugins.load(group, named or "")
        except UsageError as error:
            text = str(error) if named else f"missing key; {suggestion('', plugins.names(group))}"
            problems.append(wording.place((section, "type"), text))
    types = [c if c is Any else c.Config for c in (configs["task"], configs["method"])]
    try:
        recipe = _model(*types).model_validate(document.value)
    except ValidationError as error:
        problems += [wording.place(*wording.translate(e, types)) for e in error.errors()]
    if problems:
        raise RecipeError([text for _, text in sorted(problems)])
    return recipe


class _Wording:
    """Turns pydantic's errors into `file:line: key: problem, nearest name`."""

    def __init__(self, document: Document, origins: dict[tuple[str, ...], str], path: Path) -> None:
        self._document, self._origins, self._path = document, origins, path

    def place(self, location: tuple[Any, ...], text: str) -> tuple[int, str]:
        """Line for sorting, and the whole message."""
        key = ".".join(str(part) for part in location)
        prefix = f"{key}: " if key else ""
        origin = next((o for p, o in self._origins.items() if p == location[: len(p)]), None)
        if origin:
            return 0, f"{origin}: {prefix}{text}"
        line = next(
            (
                self._document.lines[location[:end]]
                for end in range(len(location), -1, -1)
                if location[:end] in self._document.lines
            ),
            0,
        )
        where = f"{self._path}:{line}" if line else str(self._path)
        return line, f"{where}: {prefix}{text}"

    def translate(self, error: Any, types: list[Any]) -> tuple[tuple[Any, ...], str]:
        """Location and text of one of pydantic's errors."""
        location, kind = tuple(error["loc"]), error["type"]
        if kind == "extra_forbidden":
            allowed = self._allowed(location[:-1], types)
            return location, f"unknown key; {suggestion(str(location[-1]), allowed)}"
        if kind == "missing":
            return location, "missing key"
        if kind == "value_error":
            return location, str(error["ctx"]["error"])
        found = error["input"]
        names = {
            str: "text",
            bool: "true/false",
            int: "number",
            float: "number",
            type(None): "null",
        }
        shown = json.dumps(found, default=str) if not isinstance(found, dict) else "a mapping"
        what = names.get(type(found))
        text = error["msg"].replace("Input should be", "must be").replace("String should", "must")
        return location, f"{text}, found {shown[:80]}" + (f" ({what})" if what else "")

    def _allowed(self, section: tuple[Any, ...], types: list[Any]) -> list[str]:
        sections = {
            (): Recipe,
            ("base",): BaseConfig,
            ("task",): types[0],
            ("method",): types[1],
            ("training",): TrainingConfig,
        }
        model = sections.get(section)
        return list(model.model_fields) if model is not None and model is not Any else []
