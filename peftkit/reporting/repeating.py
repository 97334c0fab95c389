"""How to run an arm again: the text of its recipe and the commands.

Called by the page; imports the arms. The YAML is written here, because PyYAML needs two
milliseconds a recipe and a page may hold a thousand.
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from peftkit.reporting.arms import NOT_PART_OF_AN_ARM, Arm, flat, section
from peftkit.reporting.record import RunRecord

_PLAIN: Final = re.compile(r"[A-Za-z_][\w./-]*")
_WORDS_WITH_A_MEANING: Final = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}


def recipe_yaml(recipe: Mapping[str, Any]) -> str:
    """The resolved recipe as YAML 1.2, without what differs from seed to seed."""
    kept = {key: recipe[key] for key in recipe if key not in NOT_PART_OF_AN_ARM}
    return "\n".join(_lines(kept, 0)) + "\n"


def commands(arm: Arm) -> list[str]:
    """One `peftkit run` a seed, with the launch that the recipe does not hold."""
    file = shlex.quote(f"{arm.name}.yaml")
    return [
        " ".join(["peftkit run", file, f"seed={run.seed}", *_launch(run.record)])
        for run in arm.runs
    ]


def common_part(arms: Sequence[Arm]) -> dict[str, Any]:
    """Dotted keys that all recipes hold with one value."""
    recipes = [flat(arm.recipe) for arm in arms if arm.recipe is not None]
    if not recipes:
        return {}
    first = recipes[0]
    return {k: v for k, v in first.items() if all(k in r and r[k] == v for r in recipes[1:])}


def own_part(arm: Arm, common: Mapping[str, Any]) -> str:
    """The keys beyond `common`, a line each, dotted as on the command line."""
    own = flat(arm.recipe or {})
    keys = [k for k in own if k not in common and k not in NOT_PART_OF_AN_ARM]
    return "".join(f"{key}: {_scalar(own[key])}\n" for key in keys)


def _launch(record: RunRecord | None) -> list[str]:
    if record is None:
        return []
    words = [f"--nproc {record.processes}"] if record.processes > 1 else []
    asked = section(record.recipe, "training").get("mixed_precision") or "no"
    if record.mixed_precision != asked:
        words.append(f"-- --mixed_precision {shlex.quote(record.mixed_precision)}")
    return words


def _lines(value: Mapping[str, Any], depth: int) -> Iterator[str]:
    for key, inner in value.items():
        head = f"{'  ' * depth}{_scalar(str(key))}:"
        if isinstance(inner, dict) and inner:
            yield head
            yield from _lines(inner, depth + 1)
        else:
            yield f"{head} {_scalar(inner)}"


def _scalar(value: Any) -> str:
    """JSON, which YAML reads alike, but for words that need no quotes."""
    plain = isinstance(value, str) and _PLAIN.fullmatch(value)
    if plain and value.lower() not in _WORDS_WITH_A_MEANING:
        return str(value)
    return json.dumps(value, ensure_ascii=False)
