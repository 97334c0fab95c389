"""Wording what is wrong with a recipe: `file:line: key: problem, nearest name`.

Called by `recipe` and by the plan of a merge; imports the bottom of the order only.
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peftkit.errors import suggestion
from peftkit.yaml_source import Document, printable

MAX_PROBLEMS = 100
"""Problems that are worded; finding the nearest name of thousands would take long."""

Sections = Mapping[tuple[Any, ...], Any]


class Wording:
    """Turns pydantic's errors into `file:line: key: problem, nearest name`."""

    def __init__(self, document: Document, origins: dict[tuple[str, ...], str], path: Path) -> None:
        self._document, self._origins, self._path = document, origins, path

    def place(self, location: tuple[Any, ...], text: str) -> tuple[int, str]:
        """Line for sorting, and the whole message."""
        key = printable(".".join(str(part) for part in location))
        prefix = f"{key}: " if key else ""
        text = printable(text, limit=1000)
        lines = self._document.lines
        for overridden, origin in self._origins.items():
            inside = overridden == location[: len(overridden)]
            made = location and location not in lines and location == overridden[: len(location)]
            if inside or made:
                return 0, f"{origin}: {prefix}{text}"
        above = (location[:end] for end in range(len(location), -1, -1))
        line = next((lines[place] for place in above if place in lines), 0)
        where = f"{self._path}:{line}" if line else str(self._path)
        return line, f"{where}: {prefix}{text}"

    def all_of(self, error: ValidationError, sections: Sections) -> list[tuple[int, str]]:
        """What `place` gives for pydantic's errors: one problem for each key or item.

        Args:
            error: All that pydantic found.
            sections: The class at each key, for the names of its keys.
        """
        groups: dict[tuple[Any, ...], list[tuple[tuple[Any, ...], Any]]] = {}
        errors = error.errors()
        for one in errors[:MAX_PROBLEMS]:
            field, location = self._written(one)
            groups.setdefault(field, []).append((location, one))
        problems = []
        for members in groups.values():
            # Of the members of a union, those that got furthest say what was meant.
            depth = max(len(location) for location, _ in members)
            for location in dict.fromkeys(place for place, _ in members if len(place) == depth):
                same = [one for place, one in members if place == location]
                problems.append(self.place(*self._translate(location, same, sections)))
        if len(errors) > MAX_PROBLEMS:
            more = f"{len(errors) - MAX_PROBLEMS} more problems are not listed"
            problems.append((sys.maxsize, f"{self._path}: {more}"))
        return problems

    def _written(self, error: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The key that an error is about, and the place in its value, both as people wrote them.

        pydantic's locations also hold the names of a union's members.
        """
        location = tuple(error["loc"])
        if error["type"] == "missing":
            return location, location
        value: Any = self._document.value
        field: tuple[Any, ...] | None = None
        place: tuple[Any, ...] = ()
        for part in location:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                field = place if field is None else field
            else:
                place = (*place, part)
        return (place if field is None else field), place

    def _translate(
        self, location: tuple[Any, ...], errors: list[Any], sections: Sections
    ) -> tuple[tuple[Any, ...], str]:
        """Location and text for pydantic's errors about one place."""
        kind = errors[0]["type"]
        if kind == "extra_forbidden":
            known = list(getattr(sections.get(location[:-1]), "model_fields", ()))
            hint = f"; {suggestion(str(location[-1]), known)}" if known else ""
            return location, f"unknown key{hint}"
        if kind == "missing":
            return location, "missing key"
        if kind == "value_error":
            return self._inner(location, str(errors[0]["ctx"]["error"]))
        texts = dict.fromkeys(_expectation(error["msg"]) for error in errors)
        first, *others = texts
        wanted = " or ".join([first, *(text.removeprefix("must be ") for text in others)])
        return location, f"{wanted}, found {shown(errors[0]['input'])}"

    def _inner(self, location: tuple[Any, ...], text: str) -> tuple[tuple[Any, ...], str]:
        """A section's own check names its key in front: `init_lora_weights: …`."""
        key, colon, rest = text.partition(": ")
        value: Any = self._document.value
        inner = (*location, *key.split("."))
        for part in inner:
            value = value.get(part) if isinstance(value, dict) else None
        return (inner, rest) if colon and value is not None else (location, text)


def _expectation(message: str) -> str:
    text = re.sub(r"^[A-Z][a-z]+ should", "must", message)
    return "must be a mapping" if text.startswith("must be a valid dictionary") else text


def shown(value: Any) -> str:
    """A value that does not fit, as JSON, and what kind of value it is."""
    names = {str: "text", bool: "true/false", int: "number", float: "number", type(None): "null"}
    if isinstance(value, dict):
        return "a mapping"
    kind = names.get(type(value))
    return printable(json.dumps(value, default=str, ensure_ascii=False)) + (
        f" ({kind})" if kind else ""
    )
