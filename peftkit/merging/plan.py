"""What is to be combined, with which weights and how: a YAML file or the words of a command.

Called by the `merge` verb and by `combining`; loads no tensor library, so that a bad plan is told
before anything heavy starts.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, ValidationInfo, field_validator

from peftkit import yaml_source
from peftkit.errors import RegistryError, UsageError, suggestion
from peftkit.recipe_problems import Wording
from peftkit.registry.names import name_problem, parse_reference
from peftkit.schema import Section
from peftkit.yaml_source import Document

ON_WEIGHTS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
"""What combines deltas of any kind, as the weights that they change."""
ON_FACTORS = (
    "cat",
    "svd",
    *ON_WEIGHTS,
    "ties_svd",
    "dare_ties_svd",
    "dare_linear_svd",
    "magnitude_prune_svd",
)
"""What combines plain LoRA deltas; PEFT's words."""


def prunes(combine: str) -> bool:
    """Whether a density says how many of the values are kept."""
    return combine.startswith(("ties", "dare", "magnitude_prune"))


def decomposes(combine: str) -> bool:
    """Whether a rank says how much of a singular value decomposition is kept."""
    return combine.endswith("svd")


def averages(combine: str) -> bool:
    """Whether the weighted values are divided by the number of deltas that agree on a sign."""
    return "ties" in combine


class WeightedDelta(Section):
    """One of the deltas that are combined."""

    name: str
    """`name`, `name@v2` or `name@TAG`."""
    weight: float | None = None
    """What its change is multiplied with; may be negative. All deltas have one, or none."""

    @field_validator("name")
    @classmethod
    def _is_a_reference(cls, value: str) -> str:
        try:
            parse_reference(value)
        except RegistryError as error:
            raise ValueError(str(error)) from None
        return value


class CombinePlan(Section):
    """Several deltas, and the one that they become."""

    save_as: str
    """Name of the result in the registry."""
    combine: str | None = None
    """By default `cat` for plain LoRA deltas and `linear` for all others: both are exact."""
    density: float | None = Field(default=None, gt=0.0, le=1.0, validate_default=True)
    """Share of the values that pruning keeps."""
    rank: int | None = Field(default=None, gt=0)
    """Rank of the result of an svd; by default the sum of the deltas' ranks."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Draws what DARE drops."""
    deltas: list[WeightedDelta]
    head_from: str | None = None
    """One of the deltas, whose head the result takes, with its task, labels and recipe. By default
    the heads are averaged by the weights, which only equal labels allow."""

    @field_validator("save_as")
    @classmethod
    def _names_a_delta(cls, value: str) -> str:
        if problem := name_problem(value):
            raise ValueError(f"{value!r}: {problem}")
        return value

    @field_validator("combine")
    @classmethod
    def _is_known(cls, value: str | None) -> str | None:
        if value is not None and value not in ON_FACTORS:
            raise ValueError(f"'{value}' is unknown; {suggestion(value, ON_FACTORS)}")
        return value

    @field_validator("density")
    @classmethod
    def _fits_the_pruning(cls, value: float | None, info: ValidationInfo) -> float | None:
        if "combine" not in info.data:  # already refused
            return value
        combine = info.data["combine"]
        needed = combine is not None and prunes(combine)
        if needed and value is None:
            raise ValueError(
                f"missing; '{combine}' keeps this share of the values: above 0, at most 1"
            )
        if value is not None and not needed:
            raise ValueError(_without_effect(combine, "prunes nothing", filter(prunes, ON_FACTORS)))
        return value

    @field_validator("rank")
    @classmethod
    def _fits_the_decomposition(cls, value: int | None, info: ValidationInfo) -> int | None:
        combine = info.data.get("combine", "svd")  # else already refused
        if value is not None and not (combine and decomposes(combine)):
            others = filter(decomposes, ON_FACTORS)
            raise ValueError(_without_effect(combine, "has no rank to choose", others))
        return value

    @field_validator("deltas")
    @classmethod
    def _are_several(cls, value: list[WeightedDelta]) -> list[WeightedDelta]:
        names = [delta.name for delta in value]
        if len(names) < 2:
            raise ValueError(f"at least two are combined, found {len(names)}")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{', '.join(twice)}: named more than once")
        given = sum(delta.weight is not None for delta in value)
        if given not in (0, len(value)):
            raise ValueError(f"{given} of {len(value)} have a weight; give one to all or to none")
        return value

    @field_validator("head_from")
    @classmethod
    def _is_one_of_them(cls, value: str | None, info: ValidationInfo) -> str | None:
        names = [delta.name for delta in info.data.get("deltas", ())]
        if value is not None and names and value not in names:
            raise ValueError(f"'{value}' is none of the deltas; {suggestion(value, names)}")
        return value

    def weights(self, combine: str) -> list[float]:
        """The weights as given; else equal ones that make an average of the deltas.

        They sum to 1, but are 1 each where PEFT divides by the number of deltas itself.
        """
        equal = 1.0 if averages(combine) else 1 / len(self.deltas)
        return [equal if delta.weight is None else delta.weight for delta in self.deltas]


def _without_effect(combine: str | None, why: str, others: Any) -> str:
    subject = f"'{combine}'" if combine else "the default"
    return f"{subject} {why}; leave it out, or combine by one of {', '.join(sorted(others))}"


def load_plan(path: Path) -> CombinePlan:
    """Read a plan from YAML.

    Raises:
        UsageError: every problem, as `file:line: key: problem`.
    """
    document = yaml_source.load(path)
    if not isinstance(document.value, dict):
        raise UsageError(f"{path}: must be a mapping with the keys save_as and deltas")
    return _validated(document, path)


def plan_from(
    names: Sequence[str], weights: Sequence[float], options: Mapping[str, Any]
) -> CombinePlan:
    """The plan that a command line spells out; `options` are the other keys, None left aside.

    Raises:
        UsageError: every problem, as `merge: key: problem`.
    """
    given = [weight if math.isfinite(weight) else None for weight in weights]
    problems = []
    if weights and len(weights) != len(names):
        problems.append(f"merge: weights: {len(weights)} for {len(names)} deltas; give one to each")
    problems += [
        f"merge: weights: must be finite numbers, found {w}" for w in weights if w not in given
    ]
    fits = bool(weights) and not problems
    deltas = [{"name": name, "weight": given[i] if fits else None} for i, name in enumerate(names)]
    content = {key: value for key, value in options.items() if value is not None}
    try:
        plan = _validated(Document({**content, "deltas": deltas}, {}), Path("merge"))
    except UsageError as error:
        raise UsageError([*problems, *error.problems]) from error
    if problems:
        raise UsageError(problems)
    return plan


def _validated(document: Document, path: Path) -> CombinePlan:
    # A key that is missed by its validator is worded like one that was written.
    document = Document({"density": None, **document.value}, document.lines)
    try:
        return CombinePlan.model_validate(document.value)
    except ValidationError as error:
        entries = document.value.get("deltas")
        count = len(entries) if isinstance(entries, list) else 0
        sections: dict[tuple[Any, ...], Any] = {("deltas", i): WeightedDelta for i in range(count)}
        found = Wording(document, {}, path).all_of(error, {(): CombinePlan, **sections})
        raise UsageError([text for _, text in sorted(found)]) from error
