"""The store of deltas on disk: `<root>/<name>/v1`, `v2`, …, each folder written once and whole.

Called by the experiment, by loading and by the CLI; imports no tensor library.
A version holds the delta's files and `manifest.json`, which is written last and says what the
delta belongs to, and the size and SHA-256 of every other file. Digests find damage, not forgery.
There are no locks: writers compete for the rename that publishes a version.
"""

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peftkit.contracts import Delta
from peftkit.errors import RegistryError, suggestion
from peftkit.registry.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    DeltaInfo,
    Manifest,
    RunSummary,
    decode_manifest,
    encode_manifest,
)
from peftkit.registry.names import (
    check_name,
    contained,
    listed,
    name_problem,
    parse_reference,
    version_number,
    versions,
)
from peftkit.registry.tensors import (
    DELTA_FILES,
    FileDigest,
    checked_file,
    delta_from_files,
    delta_to_files,
    read_file,
)
from peftkit.staging import fsync_path, staged_folder

__all__ = ["DeltaInfo", "Registry", "RunSummary", "Scan", "StoredDelta"]

MAX_ATTEMPTS = 1000
"""Version numbers that other writers may take away from one save."""

_SPACE = "free some space or point PEFTKIT_REGISTRY at another disk"
_WRITABLE = "make it writable or point PEFTKIT_REGISTRY at a folder that is"
_HINTS = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: _SPACE,
    errno.EROFS: _WRITABLE,
    errno.EACCES: _WRITABLE,
    errno.EPERM: _WRITABLE,
}


@dataclass(frozen=True)
class StoredDelta:
    """One version as its manifest describes it; its files are not verified yet."""

    name: str
    version: str
    path: Path
    info: DeltaInfo
    files: dict[str, FileDigest]
    """Every file but the manifest."""
    manifest: FileDigest


@dataclass(frozen=True)
class Scan:
    """What a look through the whole store found."""

    deltas: list[StoredDelta]
    """By name, then by version number."""
    problems: list[str]
    """One line for each folder that is not a readable version."""


class Registry:
    """The deltas below one folder. Opening it reads and creates nothing."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def save(self, name: str, delta: Delta, info: DeltaInfo) -> StoredDelta:
        """Store `delta` as the next version of `name`, wholly or not at all.

        Raises:
            RegistryError: a bad name, an empty or non-finite delta, or a disk that refuses.
        """
        check_name(name)
        if info.kind != delta.kind:
            raise RegistryError(f"{name}: info says kind '{info.kind}', delta is '{delta.kind}'")
        files = delta_to_files(delta)
        folder = contained(self.root, name)
        try:
            _make_folder(folder)
            return _publish(folder, files, info)
        except OSError as error:
            raise RegistryError(
                f"{folder}: delta not saved, nothing was stored ({error.strerror or error}); "
                f"{_HINTS.get(error.errno or 0, 'check the disk, then save again')}"
            ) from error

    def find(self, reference: str) -> StoredDelta:
        """The version that `name`, `name@v2` or `name@latest` means; reads its manifest only.

        Raises:
            RegistryError: no such delta or version, or an unreadable manifest. A damaged newest
                version is never passed over for an older one.
        """
        wanted = parse_reference(reference)
        folder = contained(self.root, wanted.name)
        known = versions(folder)
        if not known:
            raise RegistryError(self._unknown(wanted.name))
        version = wanted.version or known[-1]
        if version not in known:
            raise RegistryError(f"{folder}: no version '{version}'; {suggestion(version, known)}")
        return _read_stored(contained(folder, version))

    def verify(self, stored: StoredDelta) -> None:
        """Read every file of a version and compare it with the manifest.

        Raises:
            RegistryError: one line for each changed, missing or stray file.
        """
        self._checked_files(stored, keep=False)

    def read_delta(self, stored: StoredDelta) -> Delta:
        """The delta, its tensors made from the very bytes that were verified.

        Raises:
            RegistryError: as for `verify`, or a file that is not what its name says.
        """
        files = self._checked_files(stored, keep=True)
        return delta_from_files(stored.info.kind, files)

    def ls(self) -> list[StoredDelta]:
        """Every readable version, by name and number; `scan` has the problems too."""
        return self.scan().deltas

    def scan(self) -> Scan:
        """Every readable version, and a line for each folder that is none.

        Hidden entries (staging folders are such) and plain files beside the names are passed over.

        Raises:
            RegistryError: the root itself cannot be listed.
        """
        found = Scan([], [])
        for name in listed(self.root):
            if name.startswith(".") or os.path.isfile(self.root / name):
                continue
            if problem := name_problem(name):
                found.problems.append(f"{self.root}: folder {name!r}: {problem}")
                continue
            try:
                _scan_name(contained(self.root, name), found)
            except RegistryError as error:
                found.problems.extend(error.problems)
        return found

    def _unknown(self, name: str) -> str:
        names = [n for n in listed(self.root) if not name_problem(n)]
        known = [n for n in names if os.path.isdir(self.root / n) and versions(self.root / n)]
        hint = suggestion(name, known) if known else "the registry is empty"
        return f"{self.root}: no delta '{name}'; {hint}"

    def _checked_files(self, stored: StoredDelta, *, keep: bool) -> dict[str, bytes]:
        """The verified bytes by file name; reads each file once."""
        folder = contained(contained(self.root, stored.name), stored.version)
        expected = {**stored.files, MANIFEST: stored.manifest}
        data: dict[str, bytes] = {}
        problems: list[str] = []
        for name in sorted({*expected, *listed(folder)}):
            try:
                data[name] = checked_file(folder / name, expected.get(name), keep=keep)
            except RegistryError as error:
                problems.extend(error.problems)
        if problems:
            raise RegistryError(problems)
        return data


def _scan_name(folder: Path, found: Scan) -> None:
    """Add the versions below one name to `found`, in place."""
    for version in versions(folder):
        try:
            found.deltas.append(_read_stored(contained(folder, version)))
        except RegistryError as error:
            found.problems.extend(error.problems)
    strays = (e for e in listed(folder) if version_number(e) is None and not e.startswith("."))
    found.problems.extend(f"{folder / e}: not a version such as 'v1'; remove it" for e in strays)


def _make_folder(folder: Path) -> None:
    """Make `folder` and its parents, each entry fsynced."""
    for path in [*reversed(folder.parents), folder]:
        if not path.exists():
            path.mkdir(exist_ok=True)
            fsync_path(path.parent)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "a file lies in the folder's place")


def _publish(folder: Path, files: Mapping[str, bytes], info: DeltaInfo) -> StoredDelta:
    """Write the next version; when another writer takes its number, write the one after."""
    digests = {name: FileDigest.of(data) for name, data in files.items()}
    number = 0
    for _ in range(MAX_ATTEMPTS):
        newest = [version_number(version) or 0 for version in versions(folder)[-1:]]
        number = max(number, *newest, 0) + 1
        manifest = Manifest(name=folder.name, version=f"v{number}", info=info, files=digests)
        sealed = encode_manifest(manifest)
        try:
            _write_version(folder / manifest.version, {**files, MANIFEST: sealed})
        except OSError as error:
            if not _is_taken(error):
                raise
        else:
            return _stored(folder / manifest.version, manifest, sealed)
    raise RegistryError(
        f"{folder}: delta not saved, other writers took {MAX_ATTEMPTS} numbers; save it again"
    )


def _write_version(target: Path, files: Mapping[str, bytes]) -> None:
    try:
        with staged_folder(target) as staging:
            for name, data in files.items():
                (staging / name).write_bytes(data)
    except OSError as error:
        if _is_taken(error) or not _holds(target / MANIFEST, files[MANIFEST]):
            raise
        raise RegistryError(
            f"{target}: stored and whole, but a power cut may still undo it "
            f"({error.strerror or error}); check the disk, then verify it"
        ) from error


def _is_taken(error: OSError) -> bool:
    return isinstance(error, FileExistsError) or error.errno == errno.ENOTEMPTY


def _holds(path: Path, data: bytes) -> bool:
    try:
        return path.read_bytes() == data
    except OSError:
        return False


def _read_stored(folder: Path) -> StoredDelta:
    path = folder / MANIFEST
    try:
        data, digest = read_file(path, MAX_MANIFEST_BYTES)
    except OSError as error:
        raise RegistryError(f"{path}: unreadable manifest ({error.strerror})") from error
    if digest.size > MAX_MANIFEST_BYTES:
        raise RegistryError(
            f"{path}: manifest of {digest.size} bytes, {MAX_MANIFEST_BYTES} are allowed"
        )
    manifest = decode_manifest(data, path)
    place = f"{folder.parent.name}@{folder.name}"
    if f"{manifest.name}@{manifest.version}" != place:
        raise RegistryError(
            f"{path}: belongs to '{manifest.name}@{manifest.version}', found in '{place}'; "
            "move it back"
        )
    if manifest.files.keys() != DELTA_FILES[manifest.info.kind]:
        raise RegistryError(
            f"{path}: lists {sorted(manifest.files)}, a delta of kind '{manifest.info.kind}' "
            f"has {sorted(DELTA_FILES[manifest.info.kind])}"
        )
    return _stored(folder, manifest, data)


def _stored(folder: Path, manifest: Manifest, sealed: bytes) -> StoredDelta:
    return StoredDelta(
        name=manifest.name,
        version=manifest.version,
        path=folder,
        info=manifest.info,
        files=manifest.files,
        manifest=FileDigest.of(sealed),
    )
