"""Reading YAML that people wrote: YAML 1.2 scalars, no aliases, and the line of every key.

Called by the recipe and by the plan of a merge. PyYAML composes the nodes; the values are built
here because its own constructor reads `1e-4` as a string and `no` as false, and keeps the last of
two equal keys.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import yaml
from yaml.reader import ReaderError

from peftkit.errors import RecipeError

MAX_BYTES = 1 << 18
MAX_DEPTH = 20
MAX_NODES = 5000
"""Keys and values of a document; PyYAML needs about a quarter of a second for so many."""

Path = tuple[str | int, ...]

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]{1,4000}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NO_TEXT = re.compile("[\x00\ud800-\udfff]")
_SPECIAL = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass(frozen=True)
class Document:
    """A parsed file: its value and, for the path of each key or item, its line (from 1)."""

    value: Any
    lines: dict[Path, int]


def load(path: FilePath) -> Document:
    """Read and parse one file.

    Raises:
        RecipeError: it cannot be read, is no UTF-8 text, or what `parse` refuses.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{path}: larger than {MAX_BYTES} bytes")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}:{line}: not UTF-8 text") from error
    return parse(text, str(path))


def parse(text: str, where: str) -> Document:
    """Parse one YAML document.

    Raises:
        RecipeError: not YAML, two equal keys, aliases, tags, too large or nested too deep; every
            duplicate key is listed, most others end the reading.
    """
    if len(text) > MAX_BYTES:
        raise RecipeError(f"{where}: larger than {MAX_BYTES} bytes")
    try:
        node = _Composer(text, where).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError(f"{where}{line}: not valid YAML: {error.problem}") from error
    except ReaderError as error:
        number = text.count("\n", 0, error.position) + 1
        found = f"character #x{ord(text[error.position]):04x} is not allowed"
        raise RecipeError(f"{where}:{number}: not valid YAML: {found}") from error
    except (ValueError, OverflowError) as error:  # PyYAML lets chr() and int() fail
        found = "an escape sequence or a version is out of range"
        raise RecipeError(f"{where}: not valid YAML: {found}") from error
    builder = _Builder(where)
    value = builder.build(node, ()) if node is not None else None
    if builder.problems:
        raise RecipeError(builder.problems)
    return Document(value, builder.lines)


class _Composer(yaml.SafeLoader):
    """Composes the nodes of one document, and refuses what a recipe has no use for."""

    def __init__(self, text: str, where: str) -> None:
        super().__init__(text)
        self._where = where
        self._depth = self._nodes = self._documents = 0

    def get_event(self) -> yaml.Event:
        """The next part of the document.

        Raises:
            RecipeError: an alias, a tag, a second document, too many nodes, or too deep.
        """
        event: yaml.Event = super().get_event()  # type: ignore[no-untyped-call]
        mark = event.start_mark
        line = f"{self._where}:{mark.line + 1}" if mark else self._where
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise RecipeError(f"{line}: anchors and aliases are not allowed; write the value out")
        if tag := getattr(event, "tag", None):
            raise RecipeError(f"{line}: tag '{printable(tag)}' is not allowed")
        self._documents += isinstance(event, yaml.DocumentStartEvent)
        if self._documents > 1:
            raise RecipeError(f"{line}: a second document starts here; write one only")
        self._nodes += isinstance(event, yaml.NodeEvent)
        if self._nodes > MAX_NODES:
            raise RecipeError(f"{line}: more than {MAX_NODES} keys and values")
        self._depth += isinstance(event, yaml.CollectionStartEvent)
        self._depth -= isinstance(event, yaml.CollectionEndEvent)
        if self._depth > MAX_DEPTH:
            raise RecipeError(f"{line}: nested deeper than {MAX_DEPTH} levels")
        return event


class _Builder:
    """Turns nodes into values, noting lines and duplicate keys on the way."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.lines: dict[Path, int] = {}
        self.problems: list[str] = []

    def build(self, node: yaml.Node, path: Path) -> Any:
        """Value of `node`, noting the line of `path` and of everything below it."""
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*path, i)) for i, item in enumerate(node.value)]
        if _NO_TEXT.search(node.value):
            name = printable(".".join(map(str, path)))
            line = f"{self.where}:{node.start_mark.line + 1}"
            self.problems.append(f"{line}: {name}: holds a NUL or half a character")
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
            if _NO_TEXT.search(key):
                self.problems.append(f"{self.where}:{line}: a key holds a NUL or half a character")
                continue
            here = (*path, key)
            if key in result:
                name = printable(".".join(map(str, here)))
                first = self.lines[here]
                self.problems.append(
                    f"{self.where}:{line}: {name}: duplicate key, first on line {first}"
                )
                continue
            self.lines[here] = line
            result[key] = self.build(value_node, here)
        return result


def dump(value: Any) -> str:
    """YAML that `parse` reads back as the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Quotes texts that YAML 1.2 reads as numbers and 1.1 does not, such as `1e-4` and `08`."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = None if isinstance(scalar(data), str) else "'"
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


def printable(text: str, limit: int = 80) -> str:
    """`text` on one line: control characters escaped, and cut at `limit` characters."""
    line = text if text.isprintable() else json.dumps(text)[1:-1]
    return line if len(line) <= limit else f"{line[:limit]}…"


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
