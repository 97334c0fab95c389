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

from pydantic import (
    BaseModel,
    Field,
    SerializeAsAny,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from peftkit import plugins, yaml_source
from peftkit.errors import RecipeError, UsageError, suggestion
from peftkit.modeling.base import BaseConfig
from peftkit.plugins import Group
from peftkit.recipe_problems import Wording, shown
from peftkit.registry.names import name_problem
from peftkit.schema import Section
from peftkit.training.best import GREATER_IS_BETTER, LOWER_IS_BETTER
from peftkit.training.config import TrainingConfig
from peftkit.yaml_source import Document, printable

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"

_GROUPS: dict[str, Group] = {"task": "tasks", "method": "methods"}


class Recipe(Section):
    """One experiment. `task` and `method` are sections of the class that their `type` names."""

    name: str = Field(json_schema_extra={"pattern": NAME_PATTERN})
    """Name of the run's folder and of the delta in the registry; the default is the file's."""
    base: BaseConfig
    task: SerializeAsAny[Section]
    method: SerializeAsAny[Section]
    training: TrainingConfig
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Draws the held-out part, the head's initial weights, the batches and the dropout."""
    output_dir: str = "runs"
    """The run's folder is `<output_dir>/<name>-seed<seed>`."""

    @field_validator("name")
    @classmethod
    def _names_a_delta(cls, value: str) -> str:
        if problem := name_problem(value):
            raise ValueError(f"{shown(value)}: {problem}")
        return value

    @model_validator(mode="after")
    def _nothing_is_chosen_without_held_out_rows(self) -> Self:
        keys = ("early_stopping_patience", "metric_for_best_model", "eval_steps")
        asked = [key for key in keys if getattr(self.training, key) is not None]
        if asked and not self._holds_out:
            raise ValueError(
                f"training.{asked[0]}: needs held-out rows; set task.holdout_fraction above 0"
            )
        return self

    @property
    def _holds_out(self) -> bool:
        """Whether a part of train is held out; a task that cannot say so may do it."""
        return getattr(self.task, "holdout_fraction", None) != 0

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

    @model_validator(mode="after")
    def _direction_of_best_metric_is_known(self) -> Self:
        task_type = getattr(self.task, "type", None)
        known = self.training.greater_is_better is not None
        # A plugin's task names its metrics itself, and greater is better by the contract.
        if known or task_type not in plugins.BUILTIN["tasks"] or not self._holds_out:
            return self
        named = plugins.load("tasks", task_type)(self.task).metric_names
        name = self.training.metric_for_best_model or next(iter(named), "loss")
        if name not in LOWER_IS_BETTER | GREATER_IS_BETTER:
            raise ValueError(
                f"training.greater_is_better: must be true or false, as the best checkpoint is "
                f"chosen by '{name}', whose direction peftkit does not know"
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
        """`sha256:…` of what the run computes: not of its name, its folder or its trackers."""
        content = self.resolved()
        for key in ("name", "output_dir"):
            content.pop(key)
        content["training"].pop("report_to")
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides (`training.learning_rate=5e-4`).

    Raises:
        RecipeError: every problem of the file and the overrides, one line each.
    """
    document = yaml_source.load(path)
    if not isinstance(document.value, dict):
        raise RecipeError(f"{path}: must be a mapping with the keys base, task, method, training")
    origins, problems = _apply(document.value, overrides)
    if "name" not in document.value:
        document.value["name"] = re.sub(r"[^a-z0-9._-]", "_", path.stem.lower())
        origins["name",] = f"{path}: from the file's name, as the recipe has none"
    return _validate(document, origins, path, problems)


def from_resolved(content: dict[str, Any]) -> Recipe:
    """The recipe that `Recipe.resolved` described, e.g. in a stored delta.

    Raises:
        RecipeError: it does not fit this version of peftkit or its plugins.
    """
    return _validate(Document(content, {}), {}, Path("stored recipe"))


def resolved_yaml(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults included."""
    return yaml_source.dump(recipe.resolved())


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


def _apply(
    content: dict[str, Any], overrides: Sequence[str]
) -> tuple[dict[tuple[str, ...], str], list[str]]:
    """Set overridden values in place; returns which override set which key, and the unusable."""
    origins: dict[tuple[str, ...], str] = {}
    problems: list[str] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = tuple(key.split("."))
        where = f"override '{printable(override)}'"
        if not equals or not all(parts):
            problems.append(f"{where}: must be key=value, e.g. training.max_steps=10")
            continue
        try:
            value = yaml_source.parse(text, where).value
        except RecipeError as error:
            problems += error.problems
            continue
        section: Any = content
        for part in parts[:-1]:
            section = section.setdefault(part, {}) if isinstance(section, dict) else None
        if not isinstance(section, dict):
            problems.append(f"{where}: '{printable(key)}' is not inside a section")
            continue
        section[parts[-1]] = value
        origins[parts] = where
    return origins, problems


def _validate(
    document: Document,
    origins: dict[tuple[str, ...], str],
    path: Path,
    unusable: Sequence[str] = (),
) -> Recipe:
    """Validate every section, wording all problems at once, after the `unusable` overrides."""
    types: dict[str, Any] = {}
    problems: list[tuple[int, str]] = []
    wording = Wording(document, origins, path)
    for section, group in _GROUPS.items():
        found = _section_type(document.value.get(section), group)
        types[section] = dict[str, Any] if isinstance(found, str) else found
        if isinstance(found, str):
            problems.append(wording.place((section, "type"), found))
    try:
        recipe = _model(types["task"], types["method"]).model_validate(document.value)
    except ValidationError as error:
        problems += wording.all_of(error, _sections(types))
    if problems or unusable:
        raise RecipeError([*unusable, *(text for _, text in sorted(problems))])
    return recipe


def _section_type(content: Any, group: Group) -> Any:
    """The section's class, or what is wrong with its `type`."""
    if not isinstance(content, dict):
        return dict[str, Any]
    name = content.get("type")
    if name is None:
        return f"missing key; {suggestion('', plugins.names(group))}"
    if not isinstance(name, str):
        return f"must be a name, found {shown(name)}; {suggestion('', plugins.names(group))}"
    try:
        return plugins.load(group, name).Config
    except UsageError as error:
        return str(error)


def _sections(types: dict[str, Any]) -> dict[tuple[Any, ...], Any]:
    fixed = {"base": BaseConfig, "training": TrainingConfig}
    return {(): Recipe} | {(key,): section for key, section in (fixed | types).items()}
