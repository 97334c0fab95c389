"""Reading YAML that people wrote: YAML 1.2 scalars, no aliases, and the line of every key.

Called by the recipe. PyYAML composes the nodes; the values are built here because its own
constructor reads `1e-4` as a string and `no` as false, and keeps the last of two equal keys.
"""

import re
from dataclasses import dataclass
from typing import Any

import yaml

from peftkit.errors import RecipeError

MAX_BYTES = 1 << 20
MAX_DEPTH = 20

Path = tuple[str | int, ...]

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]{1,4000}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass(frozen=True)
class Document:
    """A parsed file: its value and, for the path of each key or item, its line (from 1)."""

    value: Any
    lines: dict[Path, int]


def parse(text: str, where: str) -> Document:
    """Parse one YAML document.

    Raises:
        RecipeError: not YAML, two equal keys, aliases, tags, or nested too deep; every duplicate
            key is listed, the others end the reading.
    """
    if len(text) > MAX_BYTES:
        raise RecipeError(f"{where}: larger than {MAX_BYTES} bytes")
    try:
        _refuse_tricks(text, where)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError(f"{where}{line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not valid YAML: {str(error).splitlines()[0]}") from error
    builder = _Builder(where)
    value = builder.build(node, ()) if node is not None else None
    if builder.problems:
        raise RecipeError(builder.problems)
    return Document(value, builder.lines)


def _refuse_tricks(text: str, where: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        mark = event.start_mark
        line = f"{where}:{mark.line + 1}" if mark else where
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise RecipeError(f"{line}: anchors and aliases are not allowed; write the value out")
        if tag := getattr(event, "tag", None):
            raise RecipeError(f"{line}: tag '{tag}' is not allowed")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise RecipeError(f"{line}: nested deeper than {MAX_DEPTH} levels")


class _Builder:
    """Turns nodes into values, noting lines and duplicate keys on the way."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.lines: dict[Path, int] = {}
        self.problems: list[str] = []

    def build(self, node: yaml.Node, path: Path) -> Any:
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*path, i)) for i, item in enumerate(node.value)]
        plain = isinstance(node, yaml.ScalarNode) and node.style is None
        return scalar(node.value) if plain else node.value

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(f"{self.where}:{line}: a key must be plain text")
                continue
            key = key_node.value
            here = (*path, key)
            if key in result:
                name = ".".join(map(str, here))
                first = self.lines[here]
                self.problems.append(
                    f"{self.where}:{line}: {name}: duplicate key, first on line {first}"
                )
                continue
            self.lines[here] = line
            result[key] = self.build(value_node, here)
        return result


def scalar(text: str) -> Any:
    """Value of an unquoted scalar in the core schema of YAML 1.2."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text) or _SPECIAL.fullmatch(text):
        return float(text.replace(".", "", 1) if _SPECIAL.fullmatch(text) else text)
    return text
