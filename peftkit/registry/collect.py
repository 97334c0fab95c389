"""`gc`: deletes the blobs that no version needs and what crashes left behind.

Called by the store. It runs beside saves without a lock: candidates are set aside first, then the
versions are read again, and what a save has come to need in between is put back.
"""

import errno
import os
from dataclasses import dataclass, field
from pathlib import Path

from peftkit.errors import RegistryError
from peftkit.registry.blobs import SET_ASIDE, Blobs
from peftkit.registry.layout import MAX_DOCUMENT_BYTES
from peftkit.registry.names import listed
from peftkit.registry.reading import links_of
from peftkit.registry.versions import Versions, parse_version
from peftkit.staging import STAGING_PREFIX, discard, is_abandoned

_FOLDERS = (".", "staging", "tags", "blobs/sha256")
"""Where a crash can leave a staging entry."""


@dataclass
class Collected:
    """What was removed, or would be."""

    blobs: list[str] = field(default_factory=list)
    """Hex digests."""
    leftovers: list[Path] = field(default_factory=list)
    freed_bytes: int = 0


def collect(root: Path, *, dry_run: bool) -> Collected:
    """Remove all that is not needed; `dry_run` only says what.

    Raises:
        OSError: the disk refuses.
        RegistryError: a version is damaged, so that it cannot be told what is needed; nothing
            was removed.
    """
    versions, blobs, found = Versions(root), Blobs(root), Collected()
    _check_links(versions, blobs)
    needed = _needed(versions)
    _leftovers(root, found, dry_run=dry_run)
    kept = {name.removeprefix(SET_ASIDE) for name in needed}
    names = [n for n in listed(blobs.folder) if not n.startswith(STAGING_PREFIX)]
    garbage = sorted({n.removeprefix(SET_ASIDE) for n in names} - kept)
    if not dry_run:
        for sha256 in {n.removeprefix(SET_ASIDE) for n in names if n.startswith(SET_ASIDE)} & kept:
            _put_back(blobs, sha256)
        for sha256 in garbage:
            if blobs.path(sha256).exists():
                os.replace(blobs.path(sha256), blobs.folder / f"{SET_ASIDE}{sha256}")
        needed = _needed(versions)
        for sha256 in set(garbage) & needed:
            _put_back(blobs, sha256)
    for sha256 in sorted(set(garbage) - needed):
        _drop(blobs, sha256, found, dry_run=dry_run)
    return found


def _needed(versions: Versions) -> set[str]:
    """Hex digest of every blob that a version or a save in work links to."""
    # Saves in work first: one that is published in between is then found among the versions.
    needed = _linked(versions, [path for path in versions.staged() if not is_abandoned(path)])
    published = [versions.path(v) for e in versions.entries() if (v := parse_version(e))]
    return needed | _linked(versions, published)


def _check_links(versions: Versions, blobs: Blobs) -> None:
    """Refuse a version whose links are damaged: what it needs would pass for garbage."""
    for version in filter(None, map(parse_version, sorted(versions.entries()))):
        try:
            found = versions.links(versions.path(version))
            manifest = blobs.read_small(versions.manifest(version), limit=MAX_DOCUMENT_BYTES)
            problems = [] if found == links_of(manifest) else ["has damaged links; verify it first"]
        except RegistryError as error:
            problems = error.problems
        if problems and not versions.is_gone(version):
            raise RegistryError(f"{version}: {line}; nothing is removed" for line in problems)


def _linked(versions: Versions, folders: list[Path]) -> set[str]:
    found: set[str] = set()
    for folder in folders:
        try:
            links = versions.links(folder)
            if None in links.values():
                raise RegistryError(f"{folder}: holds what is no link to a blob; verify it first")
        except RegistryError:
            if folder.exists():
                raise
            continue  # published or removed since
        found.update(digest for digest in links.values() if digest)
    return found


def _leftovers(root: Path, found: Collected, *, dry_run: bool) -> None:
    """Staging entries of processes that are gone, and folders of removed versions."""
    for place in _FOLDERS:
        folder = root / place
        staged = [folder / n for n in listed(folder) if n.startswith(STAGING_PREFIX)]
        found.leftovers += [path for path in staged if is_abandoned(path)]
    versions = Versions(root)
    gone = [versions.folder / entry for entry in sorted(versions.gone())]
    found.leftovers += [path for path in gone if os.path.lexists(path)]
    for path in found.leftovers:
        found.freed_bytes += path.lstat().st_size
        if dry_run:
            continue
        discard(path)
        if os.path.lexists(path):
            raise OSError(errno.EIO, "a leftover cannot be removed", str(path))


def _put_back(blobs: Blobs, sha256: str) -> None:
    aside = blobs.folder / f"{SET_ASIDE}{sha256}"
    if blobs.path(sha256).exists():
        aside.unlink(missing_ok=True)
    elif aside.exists():
        os.rename(aside, blobs.path(sha256))


def _drop(blobs: Blobs, sha256: str, found: Collected, *, dry_run: bool) -> None:
    for path in (blobs.path(sha256), blobs.folder / f"{SET_ASIDE}{sha256}"):
        if path.exists() and (dry_run or path.name.startswith(SET_ASIDE)):
            found.freed_bytes += path.stat().st_size
            found.blobs.append(sha256)
            if not dry_run:
                path.unlink()
