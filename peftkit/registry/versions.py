"""The versions of a store: `deltas/<name>@v1`, read-only folders of links to blobs.

Called by the store, its index and `gc`; imports no tensor library.
A version exists from the rename that publishes its folder until a file of its name lies in
`removed/`. Both only ever grow, so writers need no lock, no number is used twice, and what one
writer does is never undone by another.
"""

import errno
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from peftkit.errors import RegistryError
from peftkit.registry.names import listed, name_problem, version_number
from peftkit.registry.root import unreadable
from peftkit.staging import fsync_path, make_folder, staging_name

MANIFEST_LINK = "oci-manifest.json"
"""Link to the OCI manifest; its target says the manifest's digest."""
INFO_LINK = "manifest.json"
"""Link to the delta's info."""
MAX_ATTEMPTS = 1000
"""Version numbers that other writers may take away from one save."""

_BLOBS = "../../blobs/sha256/"
_TARGET = re.compile(rf"{re.escape(_BLOBS)}([0-9a-f]{{64}})")


class Version(NamedTuple):
    """A name and its number; sorts by name, then from old to new."""

    name: str
    number: int

    def __str__(self) -> str:
        return f"{self.name}@v{self.number}"


class Versions:
    """The version folders of one store and the marks of removed ones."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "deltas"
        self.removed = root / "removed"
        self.staging = root / "staging"

    def path(self, version: Version) -> Path:
        """The folder of a version."""
        return self.folder / str(version)

    def entries(self) -> set[str]:
        """What lies among the versions and was not removed; unchecked, since there may be many.

        Raises:
            RegistryError: the store cannot be listed.
        """
        return set(_entries(self.folder)) - self.gone()

    def gone(self) -> set[str]:
        """`name@vN` of every version that was removed."""
        return set(_entries(self.removed))

    def is_gone(self, version: Version) -> bool:
        """Whether a version was removed."""
        return os.path.lexists(self.removed / str(version))

    def of(self, name: str) -> list[Version]:
        """The versions of one name, oldest first.

        Raises:
            RegistryError: the store cannot be listed.
        """
        mine = (e for e in self.entries() if e.startswith(f"{name}@"))
        return sorted(version for e in mine if (version := parse_version(e)))

    def names(self) -> list[str]:
        """Every name that has a version, sorted."""
        return sorted({v.name for e in self.entries() if (v := parse_version(e))})

    def staged(self) -> list[Path]:
        """Folders of saves that are in work or were cut short."""
        return [self.staging / entry for entry in listed(self.staging)]

    def stage(self, links: Mapping[str, str]) -> Path:
        """A hidden folder of links (name → hex digest), on disk; `gc` spares what they mean.

        Raises:
            OSError: the disk refuses.
        """
        make_folder(self.folder)
        make_folder(self.staging)
        staging = self.staging / staging_name()
        staging.mkdir()
        for name, sha256 in links.items():
            (staging / name).symlink_to(f"{_BLOBS}{sha256}")
        fsync_path(staging)
        return staging

    def publish(self, staging: Path, name: str, *, after: int = 0, likely: bool = False) -> Version:
        """Make a staged folder the next version of `name`, of a number greater than `after`.

        Args:
            staging: What `stage` gave.
            name: The delta's.
            after: The newest number that is known.
            likely: Whether there hardly is a newer one: listing ten thousand folders takes longer
                than trying.

        Raises:
            OSError: the disk refuses.
            RegistryError: other writers took every number.
        """
        number, next_one = after, Version(name, after + 1)
        if likely and not self.is_gone(next_one) and self.place(staging, next_one):
            return next_one
        for _ in range(MAX_ATTEMPTS):
            version = Version(name, max(number, self._newest_used(name)) + 1)
            if self.place(staging, version):
                return version
            number = version.number
        raise RegistryError(
            f"{self.folder / name}: delta not saved, other writers took {MAX_ATTEMPTS} numbers; "
            "save it again"
        )

    def _newest_used(self, name: str) -> int:
        entries = [*_entries(self.folder), *_entries(self.removed)]
        prefix = f"{name}@"
        mine = [parse_version(e) for e in entries if e.startswith(prefix)]
        return max((version.number for version in mine if version), default=0)

    def place(self, staging: Path, version: Version) -> bool:
        """Publish under exactly this number; False if it is taken.

        Raises:
            OSError: the disk refuses. The folder may be there already if this was the last fsync.
        """
        try:
            os.rename(staging, self.path(version))
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                return False
            raise
        fsync_path(self.folder)
        return True

    def links(self, folder: Path) -> dict[str, str | None]:
        """Entry → hex digest of the blob that it links to; None for anything else.

        Raises:
            RegistryError: the folder cannot be listed.
        """
        return {entry: _target(folder / entry) for entry in listed(folder)}

    def manifest(self, version: Version) -> str:
        """Hex digest of the OCI manifest of a version.

        Raises:
            RegistryError: its folder does not say.
        """
        link = self.path(version) / MANIFEST_LINK
        found = None if self.path(version).is_symlink() else _target(link)
        if found is None:
            raise RegistryError(
                f"{link}: expected a link to a blob; remove the folder, "
                "and the next command that lists the store makes it anew"
            )
        return found

    def remove(self, version: Version) -> None:
        """Take a version away for good; its blobs stay, and its folder if the disk keeps it.

        Raises:
            OSError: the disk refuses; the version is there whole, or gone.
        """
        make_folder(self.removed)
        os.close(os.open(self.removed / str(version), os.O_CREAT | os.O_WRONLY, 0o444))
        fsync_path(self.removed)
        with suppress(OSError):  # `gc` lists what is left
            self._clear(version)

    def _clear(self, version: Version) -> None:
        path, aside = self.path(version), self.staging / staging_name()
        if path.is_symlink():
            path.unlink()
        elif path.exists():
            make_folder(self.staging)
            os.rename(path, aside)
            shutil.rmtree(aside)


def _entries(folder: Path) -> list[str]:
    """Names in a folder that may hold many, in no order; none if it does not exist.

    Raises:
        RegistryError: the folder cannot be listed.
    """
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise unreadable(folder, "listed", error) from error


def parse_version(entry: str) -> Version | None:
    """`name@v3` as a version; None if it is none."""
    name, _, number = entry.partition("@")
    found = version_number(number)
    return Version(name, found) if found and not name_problem(name) else None


def _target(link: Path) -> str | None:
    try:
        match = _TARGET.fullmatch(os.readlink(link))
    except OSError:
        return None
    return match[1] if match else None
