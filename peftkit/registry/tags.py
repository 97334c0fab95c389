"""Tags of a store: `tags/<name>@<tag>`, small files such as `v3 sha256:…`.

Called by the store, its lookup and its index. A tag may be moved; a version never changes. The
digest is that of the version's manifest, so that a changed number is noticed. A tag of a removed
version means nothing and stays where it is: whoever took it away might take one that was set anew.
"""

import os
import re
from pathlib import Path

from peftkit.errors import RegistryError
from peftkit.registry.names import listed, name_problem, version_number
from peftkit.registry.versions import Version, Versions
from peftkit.staging import fsync_path, make_folder, write_file

_CONTENT = re.compile(r"(v[0-9]+) sha256:([0-9a-f]{64})\n")
_MAX_BYTES = 128


class Tags:
    """The tags of one store."""

    def __init__(self, root: Path, versions: Versions) -> None:
        self.folder = root / "tags"
        self.versions = versions

    def all(self) -> tuple[dict[str, Version], list[str]]:
        """`name@tag` → the version it means, sorted; and a line for each that is damaged.

        Raises:
            RegistryError: the folder cannot be listed.
        """
        return self._read_all("")

    def _read_all(self, prefix: str) -> tuple[dict[str, Version], list[str]]:
        found: dict[str, Version] = {}
        problems: list[str] = []
        for entry in (entry for entry in listed(self.folder) if entry.startswith(prefix)):
            try:
                version = None if entry.startswith(".") else self.read(entry)
            except RegistryError as error:
                problems.extend(error.problems)
            else:
                found |= {entry: version} if version else {}
        return found, problems

    def read(self, entry: str) -> Version | None:
        """What `name@tag` means; None if there is no such tag, or only of a removed version.

        Raises:
            RegistryError: a damaged tag.
        """
        path = self.folder / entry
        name, _, tag = entry.partition("@")
        try:
            with path.open("rb") as stream:
                match = _CONTENT.fullmatch(stream.read(_MAX_BYTES).decode())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RegistryError(f"{path}: unreadable tag; set it again with --force") from error
        number = version_number(match[1]) if match else None
        if match is None or number is None or name_problem(name) or name_problem(tag):
            raise RegistryError(
                f"{path}: expected a version and its digest, such as 'v1 sha256:…'; "
                "set the tag again with --force"
            )
        version = Version(name, number)
        return None if self.versions.is_gone(version) else self._checked(path, version, match[2])

    def _checked(self, path: Path, version: Version, expected: str) -> Version:
        found = self.versions.manifest(version)
        if found != expected:
            raise RegistryError(
                f"{path}: expected {version} to be sha256:{expected}, found sha256:{found}; "
                "set the tag again with --force"
            )
        return version

    def of(self, name: str) -> dict[str, Version]:
        """Tag → version for one name, without what is damaged."""
        prefix = f"{name}@"
        found, _ = self._read_all(prefix)
        return {entry.removeprefix(prefix): version for entry, version in found.items()}

    def has(self, name: str, tag: str) -> bool:
        """Whether there is such a tag, damaged or not."""
        return os.path.lexists(self.folder / f"{name}@{tag}")

    def set(self, version: Version, tag: str) -> None:
        """Let `tag` mean `version`, in one step.

        Raises:
            OSError: the disk refuses.
            RegistryError: the version is damaged.
        """
        content = f"v{version.number} sha256:{self.versions.manifest(version)}\n"
        make_folder(self.folder)
        write_file(self.folder / f"{version.name}@{tag}", content.encode())

    def remove(self, name: str, tag: str) -> None:
        """Take a tag away; what it meant stays."""
        (self.folder / f"{name}@{tag}").unlink(missing_ok=True)
        fsync_path(self.folder)
