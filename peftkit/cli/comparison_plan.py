"""Which recipes are compared under which seeds: a YAML file, the words of a command, or both.

Called by the verb `compare`; loads no tensor library, so that a bad plan is told before anything
heavy starts.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from peftkit import yaml_source
from peftkit.cli.report import MAX_PRICE
from peftkit.errors import RecipeError, UsageError
from peftkit.recipe import Recipe, load_recipe
from peftkit.recipe_problems import Wording
from peftkit.schema import Section
from peftkit.yaml_source import Document

MAX_SEEDS = 1000
_GIVEN_ELSEWHERE = {"seed": "seeds", "output_dir": "out", "name": "the recipe itself"}
"""Keys that no override may set, and what sets them."""
_RECIPE_KEYS = ("base", "task", "method", "training")
_PLAN_SUFFIXES = (".yaml", ".yml")
_OVERRIDE = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*=")
_SEED_LIST = re.compile(r"[0-9]+,([0-9]+(,[0-9]+)*)?")


class ComparisonPlan(Section):
    """Recipes, each of which runs under every seed."""

    recipes: list[str]
    """Recipe files; a relative path counts from the plan's own folder."""
    seeds: int | list[int] = 3
    """3 stands for 0, 1 and 2."""
    overrides: dict[str, Any] | list[str] = Field(default_factory=list)
    """Keys that are set in every recipe: a mapping, or a list of `key=value`."""
    out: str = "comparison"
    """Folder of the runs and of the report; a relative path counts from the current folder."""
    jobs: int = Field(default=1, ge=1)
    """Runs side by side."""
    price_per_hour: float | None = Field(default=None, ge=0.0, le=MAX_PRICE)
    """Of this machine, in any currency."""

    @field_validator("recipes")
    @classmethod
    def _are_some(cls, value: list[str]) -> list[str]:
        if not value:
            raise ValueError("name at least one recipe")
        return value

    @field_validator("seeds")
    @classmethod
    def _are_distinct(cls, value: int | list[int]) -> int | list[int]:
        count = value if isinstance(value, int) else len(value)
        if not 1 <= count <= MAX_SEEDS:
            raise ValueError(f"must be 1 to {MAX_SEEDS} seeds, found {count}")
        listed = [] if isinstance(value, int) else value
        if wrong := [seed for seed in listed if not 0 <= seed < 2**32]:
            raise ValueError(f"must be at least 0 and less than {2**32}, found {wrong[0]}")
        if twice := sorted({seed for seed in listed if listed.count(seed) > 1}):
            raise ValueError(f"{', '.join(map(str, twice))} named more than once")
        return value

    @field_validator("overrides")
    @classmethod
    def _leave_names_alone(cls, value: dict[str, Any] | list[str]) -> dict[str, Any] | list[str]:
        keys = [word.partition("=")[0] for word in _words(value)]
        if taken := sorted(set(keys) & _GIVEN_ELSEWHERE.keys()):
            said = [f"'{key}' is said by {_GIVEN_ELSEWHERE[key]}" for key in taken]
            raise ValueError("; ".join(said))
        return value

    @field_validator("out")
    @classmethod
    def _is_a_folder(cls, value: str) -> str:
        if not value or (Path(value).exists() and not Path(value).is_dir()):
            raise ValueError(f"must name a folder, found {value!r}")
        return value

    def seed_list(self) -> list[int]:
        """The seeds, in the order in which they run."""
        return list(range(self.seeds)) if isinstance(self.seeds, int) else list(self.seeds)

    def override_words(self) -> list[str]:
        """The overrides as `key=value`."""
        return list(_words(self.overrides))


@dataclass(frozen=True)
class PlannedRun:
    """One recipe under one seed; `recipe` is resolved, `file` is where it stands."""

    file: str
    recipe: Recipe
    overrides: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.recipe.run_folder

    @property
    def output(self) -> Path:
        """What the run's processes say."""
        return self.folder.with_name(f"{self.folder.name}.out")

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.recipe.name} seed {self.recipe.seed}"

    def script_arguments(self) -> list[str]:
        """What follows `run.py` on its command line, but for flags."""
        return [self.file, *self.overrides, f"seed={self.recipe.seed}"]


def read_plan(words: Sequence[str], options: Mapping[str, Any]) -> ComparisonPlan:
    """The plan that a command line spells out, over the file that it may name.

    Args:
        words: A plan, or recipes; and `key=value` overrides, which come after the plan's own.
        options: `seeds` as text; `out`, `jobs`, `price_per_hour`; None leaves the plan's value.

    Raises:
        UsageError: every problem, as `file:line: key: problem` or `--option value: key: problem`.
    """
    files, overrides = _split(words)
    plan = _plan_file(files)
    if plan is None:
        content: dict[str, Any] = {"recipes": files, "overrides": overrides}
        document, path = Document(content, {}), Path("compare")
    else:
        path = Path(files[0])
        document = plan
    given = {key: value for key, value in options.items() if value is not None}
    origins: dict[tuple[str, ...], str] = {
        (key,): f"--{key.replace('_', '-')} {given[key]}" for key in given
    }
    if "seeds" in given:
        given["seeds"] = _parsed_seeds(given["seeds"])
    found = _validated(Document({**document.value, **given}, document.lines), origins, path)
    if plan is None:
        return found
    return _from_file(found, path.parent, overrides)


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Recipe files and overrides; a file may have an equals sign in its name."""
    overrides = [word for word in words if _OVERRIDE.match(word) and not Path(word).is_file()]
    return [word for word in words if word not in overrides], overrides


def _plan_file(files: Sequence[str]) -> Document | None:
    """The one plan among the files; None where all are recipes, or cannot be read as YAML."""
    plans = {file: document for file in files if (document := _if_plan(file)) is not None}
    if plans and len(files) > 1:
        raise UsageError(
            [f"{file}: is the plan of a comparison, no recipe; give it alone" for file in plans]
        )
    return plans[files[0]] if plans else None


def _if_plan(file: str) -> Document | None:
    """A recipe has sections, a plan has `recipes`, which may be misspelled."""
    try:
        document = yaml_source.load(Path(file)) if file.endswith(_PLAN_SUFFIXES) else None
    except RecipeError:
        return None  # told with the problems of the recipes
    keys = document.value.keys() if document and isinstance(document.value, dict) else ()
    return document if keys and not any(key in keys for key in _RECIPE_KEYS) else None


def _parsed_seeds(text: str) -> Any:
    """`3` or `0,5,7`; `5,` is the one seed 5. What is neither stays text and is refused."""
    if text.isdecimal():
        return int(text)
    if _SEED_LIST.fullmatch(text):
        return [int(part) for part in text.split(",") if part]
    return text


def _validated(
    document: Document, origins: dict[tuple[str, ...], str], path: Path
) -> ComparisonPlan:
    try:
        return ComparisonPlan.model_validate(document.value)
    except ValidationError as error:
        found = Wording(document, origins, path).all_of(error, {(): ComparisonPlan})
        raise UsageError([text for _, text in sorted(found)]) from error


def _from_file(plan: ComparisonPlan, folder: Path, overrides: Sequence[str]) -> ComparisonPlan:
    """The plan as seen from the current folder, with the command line's overrides at its end."""
    merged = {
        **plan.model_dump(),
        "recipes": [os.path.normpath(folder / recipe) for recipe in plan.recipes],
        "overrides": [*plan.override_words(), *overrides],
    }
    return _validated(Document(merged, {}), {}, Path("compare"))


def _words(overrides: Mapping[str, Any] | Sequence[str], above: str = "") -> Iterator[str]:
    """`key=value` for a list as it is, and for a mapping with dotted keys."""
    if not isinstance(overrides, Mapping):
        yield from overrides
        return
    for key, value in overrides.items():
        if isinstance(value, dict) and value:
            yield from _words(value, f"{above}{key}.")
        else:
            yield f"{above}{key}={json.dumps(value, ensure_ascii=False)}"


def planned_runs(plan: ComparisonPlan) -> list[PlannedRun]:
    """Every recipe under every seed: the first seed of all recipes, then the second.

    So a comparison that is stopped early has as many seeds of one recipe as of another.

    Raises:
        RecipeError: every problem of all recipes; a recipe that is given twice, two of one name.
    """
    folder = json.dumps(str(Path(plan.out) / "runs"), ensure_ascii=False)
    overrides = (*plan.override_words(), f"output_dir={folder}")
    recipes: dict[str, Recipe] = {}
    problems: list[str] = []
    for file in dict.fromkeys(plan.recipes):
        try:
            recipes[file] = load_recipe(Path(file), overrides)
        except RecipeError as error:
            problems += error.problems
    problems += [*_repeated(plan.recipes), *_of_one_name(recipes)]
    if problems:
        raise RecipeError(dict.fromkeys(problems))
    return [
        PlannedRun(file, recipe.model_copy(update={"seed": seed}), overrides)
        for seed in plan.seed_list()
        for file, recipe in recipes.items()
    ]


def _repeated(files: Sequence[str]) -> list[str]:
    places = [Path(file).resolve() for file in files]
    twice = [f for i, f in enumerate(files) if places[i] in places[:i]]
    return [f"{file}: given more than once; each recipe is run once a seed" for file in twice]


def _of_one_name(recipes: Mapping[str, Recipe]) -> list[str]:
    first: dict[str, str] = {}
    problems = []
    for file, recipe in recipes.items():
        other = first.setdefault(recipe.name, file)
        if other != file and Path(other).resolve() != Path(file).resolve():
            problems.append(
                f"{file}: name: '{recipe.name}' is also that of {other}; give each its own, "
                "as runs are kept by name"
            )
    return problems


def stored_text(plan: ComparisonPlan, *, jobs: int) -> str:
    """The plan as `comparison.yaml` in its own folder, which the verb takes as well.

    Args:
        plan: As the command line gave it.
        jobs: The most runs that were ever side by side in this folder.
    """
    content: dict[str, Any] = {
        "recipes": [os.path.relpath(recipe, plan.out) for recipe in plan.recipes],
        "seeds": plan.seed_list(),
        "overrides": plan.override_words(),
        "out": plan.out,
        "jobs": jobs,
    }
    if plan.price_per_hour is not None:
        content["price_per_hour"] = plan.price_per_hour
    return yaml_source.dump(content)


def stored_jobs(file: Path) -> int:
    """The `jobs` of an earlier `comparison.yaml`; 1 if there is none that can be read."""
    try:
        content = yaml_source.load(file).value
    except RecipeError:
        return 1
    jobs = content.get("jobs") if isinstance(content, dict) else None
    return jobs if isinstance(jobs, int) and jobs > 0 else 1
