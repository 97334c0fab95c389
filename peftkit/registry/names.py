"""What a delta is called: names, references and the folders that they stand for.

Called by the store; no tensor library is imported. A name is a single segment: with a version it
becomes one folder. References are `name`, `name@v3`, `name@latest`, `name@TAG` and
`name@sha256:HEX`, the digest of a version's OCI manifest.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from peftkit.errors import RegistryError
from peftkit.registry.root import unreadable

LATEST = "latest"

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_VERSION = re.compile(r"v[1-9][0-9]{0,8}")
_VERSION_LIKE = re.compile(r"v[0-9]+")
_WINDOWS_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_SHOWN_CHARACTERS = 80


@dataclass(frozen=True)
class Reference:
    """Which delta is meant. All but the name None is the newest version."""

    name: str
    version: str | None = None
    tag: str | None = None
    digest: str | None = None


def check_name(name: str) -> None:
    """Refuse a name that is not safe as one folder on every file system.

    Raises:
        RegistryError: the name breaks the grammar, or is kept free.
    """
    problem = name_problem(name)
    if problem:
        raise RegistryError(f"delta name {shown(name)}: {problem}")


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
    return None


def check_tag(tag: str) -> None:
    """Refuse a tag that breaks the grammar of names or reads as something else.

    Raises:
        RegistryError: what is wrong and what is allowed.
    """
    problem = name_problem(tag)
    if problem:
        raise RegistryError(f"tag {shown(tag)}: {problem}")


def parse_reference(reference: str) -> Reference:
    """Read `name`, `name@vN`, `name@latest`, `name@TAG` or `name@sha256:HEX`.

    Raises:
        RegistryError: the name or what follows it breaks the grammar.
    """
    name, at, selector = reference.partition("@")
    check_name(name)
    if not at or selector == LATEST:
        return Reference(name)
    if _VERSION.fullmatch(selector):
        return Reference(name, version=selector)
    if _DIGEST.fullmatch(selector):
        return Reference(name, digest=selector)
    if name_problem(selector):
        raise RegistryError(
            f"reference {shown(reference)}: version {shown(selector)} is unreadable; expected "
            f"'{name}', '{name}@latest', '{name}@v1', a tag or '{name}@sha256:' and 64 hex digits"
        )
    return Reference(name, tag=selector)


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
        raise unreadable(folder, "listed", error) from error


def shown(text: str) -> str:
    """Quoted on one line, whatever it holds, and not longer than a line."""
    cut = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
    return repr(cut)
