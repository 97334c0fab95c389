"""What a search asks and answers, and whether a folder that it comes to can be used.

Shared by `sources` and `hub`; imports `splits` and the bottom of the order.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from peftkit.data.splits import split_files
from peftkit.errors import SourceError

Kind = Literal["models", "datasets"]
Origin = Literal["path", "mirror", "hub", "package", "sample"]

NOUNS = {"models": "model", "datasets": "data set"}


@dataclass(frozen=True)
class Located:
    """Where something was found."""

    path: Path
    """A folder, or `sample:<name>`, or `hub:<name>` for a data set that the Hub serves."""
    origin: Origin
    name: str
    """As the recipe says it, also where a sample stands in for it."""
    config: str | None = None
    revision: str | None = None
    """The commit, if it came from the Hub or its cache."""


@dataclass(frozen=True)
class Request:
    """What `locate` is asked for; each place that is tried gets it whole."""

    kind: Kind
    name: str
    config: str | None
    revision: str | None
    offline: str | None

    def found(self, path: Path, origin: Origin, revision: str | None = None) -> Located:
        """The answer of a place that has it."""
        return Located(path, origin, self.name, self.config, revision)


def check_folder(kind: Kind, folder: Path) -> None:
    """Returns if the folder can be used; a data set's files are only looked for, not read.

    Raises:
        SourceError: it cannot; every problem of a model's folder, one line each.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "missing"
        raise SourceError(f"{folder}: {found}; expected the folder of a {NOUNS[kind]}")
    if kind == "datasets":
        split_files(folder)
    elif problems := _model_problems(folder):
        raise SourceError(problems)


def _model_problems(folder: Path) -> list[str]:
    weights = sorted(folder.glob("*.safetensors"))
    problems = [p for path in weights if (p := _weights_problem(path))]
    try:
        json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        problems.append(f"{folder}: needs a readable config.json: {one_line(error)}")
    index = folder / "model.safetensors.index.json"
    if index.exists() and folder / "model.safetensors" not in weights:
        shards = set(re.findall(r'"([^"/]+\.safetensors)"', index.read_text("utf-8", "replace")))
        missing = sorted(shards - {path.name for path in weights})
        problems += [f"{folder}: {name} is missing; {index.name} names it" for name in missing]
    elif not weights:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth"})
        only = f" and only {', '.join(pickles)}; convert to safetensors" if pickles else ""
        problems.append(f"{folder}: holds no *.safetensors{only}")
    return problems


def _weights_problem(path: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            return None
    except (SafetensorError, OSError) as error:
        return f"{path}: damaged or incomplete safetensors: {one_line(error)}"


def one_line(error: BaseException) -> str:
    """An error of a library, for the end of a problem line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
