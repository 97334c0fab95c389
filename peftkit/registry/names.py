"""What a delta is called: names, references and the folders that they stand for.

Called by the store; no tensor library is imported. A name is a single segment: it becomes one
folder directly under the registry's root. References are `name`, `name@v3` and `name@latest`.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from peftkit.errors import RegistryError

LATEST = "latest"

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_VERSION = re.compile(r"v[1-9][0-9]{0,8}")
_VERSION_LIKE = re.compile(r"v[0-9]+")
_WINDOWS_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")
_OCI_LAYOUT = frozenset({"blobs", "index.json", "oci-layout"})
_SHOWN_CHARACTERS = 80


@dataclass(frozen=True)
class Reference:
    """Which delta is meant; `version` None is the newest."""

    name: str
    version: str | None = None


def check_name(name: str) -> None:
    """Refuse a name that is not safe as one folder on every file system.

    Raises:
        RegistryError: the name breaks the grammar, or is kept free.
    """
    problem = name_problem(name)
    if problem:
        raise RegistryError(f"delta name {_shown(name)}: {problem}")


def name_problem(name: str) -> str | None:
    """What is wrong with `name` and what is allowed, or None if it is a good name."""
    if not _NAME.fullmatch(name):
        return (
            "expected 1 to 63 characters of a-z, 0-9, '.', '_' and '-', "
            "the first a letter or a digit, such as 'reviews-lora'"
        )
    if name == LATEST or _VERSION_LIKE.fullmatch(name):
        return "it would read as a version; take another, such as 'reviews-lora'"
    # Windows drops a trailing dot, so 'a.' and 'a' would be one folder there.
    if name.endswith(".") or _WINDOWS_DEVICE.fullmatch(name):
        return "Windows cannot keep a folder of that name; take another, such as 'reviews-lora'"
    if name in _OCI_LAYOUT:
        return "kept free for the files of an OCI layout; take another, such as 'reviews-lora'"
    return None


def parse_reference(reference: str) -> Reference:
    """Read `name`, `name@vN` or `name@latest`.

    Raises:
        RegistryError: the name or the version breaks the grammar.
    """
    name, at, version = reference.partition("@")
    check_name(name)
    if not at or version == LATEST:
        return Reference(name)
    if not _VERSION.fullmatch(version):
        raise RegistryError(
            f"reference {_shown(reference)}: version {_shown(version)} is unreadable; "
            f"expected '{name}', '{name}@latest' or '{name}@v1'"
        )
    return Reference(name, version)


def version_number(version: str) -> int | None:
    """3 for 'v3'; None for anything else, 'v0' and 'v03' included."""
    return int(version[1:]) if _VERSION.fullmatch(version) else None


def listed(folder: Path) -> list[str]:
    """Names of all entries of `folder`, sorted; none if it does not exist.

    Raises:
        RegistryError: the folder cannot be listed.
    """
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RegistryError(f"{folder}: cannot be listed ({error.strerror})") from error


def versions(folder: Path) -> list[str]:
    """The versions below a name's folder, oldest first.

    Raises:
        RegistryError: the folder cannot be listed.
    """
    numbers = (version_number(entry) for entry in listed(folder))
    return [f"v{number}" for number in sorted(n for n in numbers if n is not None)]


def contained(parent: Path, entry: str) -> Path:
    """`parent / entry`, which lies there in truth and not by a symbolic link.

    Raises:
        RegistryError: `entry` leads to another place.
    """
    folder = parent / entry
    try:
        inside = folder.resolve() == parent.resolve() / entry
    except (OSError, RuntimeError):  # a loop of links
        inside = False
    if not inside:
        raise RegistryError(
            f"{folder}: is a symbolic link; put the real folder in its place or remove it"
        )
    return folder


def _shown(text: str) -> str:
    """Quoted on one line, whatever it holds, and not longer than a line."""
    cut = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
    return repr(cut)
