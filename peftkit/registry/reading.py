"""A version read back: its documents, its folder of links, the bytes of its files.

Called by the store; imports no tensor library. Nothing is trusted that does not hash to its name.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.errors import RegistryError
from peftkit.registry.blobs import Blobs
from peftkit.registry.digests import FileDigest
from peftkit.registry.layout import MAX_DOCUMENT_BYTES, VersionManifest, decode_manifest
from peftkit.registry.manifest import DeltaInfo, decode_info
from peftkit.registry.summary import summary_of
from peftkit.registry.tensors import DELTA_FILES
from peftkit.registry.versions import INFO_LINK, MANIFEST_LINK, Version, Versions
from peftkit.staging import discard


@dataclass(frozen=True)
class StoredDelta:
    """One version as its info describes it; its files are not verified yet."""

    name: str
    version: str
    path: Path
    """The folder that PEFT or a person opens."""
    info: DeltaInfo
    files: dict[str, FileDigest]
    """Every file of the delta itself."""
    digest: str
    """`sha256:…` of the OCI manifest, which fixes all the rest."""

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class Contents:
    """The bytes of one version."""

    files: dict[str, bytes]
    """By name; the delta's own."""
    info: bytes
    manifest: bytes

    @property
    def manifest_digest(self) -> FileDigest:
        """Digest of the OCI manifest, which fixes all the rest."""
        return FileDigest.of(self.manifest)

    def by_digest(self) -> dict[str, bytes]:
        """Every blob by its hex digest."""
        blobs = (*self.files.values(), self.info, self.manifest)
        return {FileDigest.of(data).sha256: data for data in blobs}


class Reader:
    """Reads the versions of one store."""

    def __init__(self, blobs: Blobs, versions: Versions) -> None:
        self.blobs = blobs
        self.versions = versions

    def stored(self, version: Version) -> StoredDelta:
        """One version as its manifest and its info describe it.

        Raises:
            RegistryError: damaged, or of a newer schema.
        """
        return self._stored(version)[0]

    def _stored(self, version: Version) -> tuple[StoredDelta, FileDigest]:
        """As `stored`, and the digest of the manifest."""
        sha256 = self.versions.manifest(version)
        data, about = self.documents(sha256)
        manifest, info = decode(data, about, where=self.blobs.path(sha256))
        path, number = self.versions.path(version), f"v{version.number}"
        stored = StoredDelta(version.name, number, path, info, manifest.files, f"sha256:{sha256}")
        return stored, FileDigest(size=len(data), sha256=sha256)

    def documents(self, sha256: str) -> tuple[bytes, bytes]:
        """The bytes of a manifest and of the info that it names, both verified."""
        data = self.blobs.read_small(sha256, limit=MAX_DOCUMENT_BYTES)
        manifest = decode_manifest(data, self.blobs.path(sha256))
        if manifest.info.size > MAX_DOCUMENT_BYTES:
            raise RegistryError(
                f"{self.blobs.path(sha256)}: info of {manifest.info.size} bytes, "
                f"at most {MAX_DOCUMENT_BYTES} are allowed"
            )
        return data, self.blobs.read(manifest.info)

    def listed(self, version: Version) -> tuple[FileDigest, dict[str, Any]]:
        """Digest of the manifest, and what a listing shows."""
        stored, manifest = self._stored(version)
        return manifest, summary_of(stored)

    def restore(self, version: Version, sha256: str) -> None:
        """Make the folder of a version whose manifest is there.

        Raises:
            OSError: the disk refuses.
            RegistryError: its documents are not there, or damaged.
        """
        data, _ = self.documents(sha256)
        staging = self.versions.stage(links_of(data))
        if not self.versions.place(staging, version):
            discard(staging)

    def checked_files(
        self, stored: StoredDelta, *, recorded: FileDigest | None, keep: bool
    ) -> dict[str, bytes]:
        """The verified bytes of the delta's files by name; reads each once.

        `recorded` is what `index.json` says of the manifest, None where it does not know.

        Raises:
            RegistryError: one line for each changed, missing or stray file.
        """
        problems: list[str] = []
        data: dict[str, bytes] = {}
        manifest = self.blobs.read_small(
            stored.digest.removeprefix("sha256:"), limit=MAX_DOCUMENT_BYTES
        )
        problems += self._folder_problems(stored, links_of(manifest), recorded)
        decoded = decode_manifest(manifest, stored.path)
        for name, expected in {**decoded.files, INFO_LINK: decoded.info}.items():
            try:
                data[name] = self.blobs.read(expected, keep=keep)
            except RegistryError as error:
                problems.extend(f"{stored} {name}: {problem}" for problem in error.problems)
        if problems:
            raise RegistryError(problems)
        return {name: data[name] for name in decoded.files}

    def _folder_problems(
        self, stored: StoredDelta, expected: dict[str, str], recorded: FileDigest | None
    ) -> list[str]:
        path = stored.path
        found = self.versions.links(path)
        problems = [
            f"{path / name}: expected a link to sha256:{expected[name]}, "
            f"found {'another' if name in found else 'nothing'}; remove the folder and list the "
            "store, which makes it anew"
            for name in expected
            if found.get(name) != expected[name]
        ]
        problems += [f"{path / name}: stray; remove it" for name in found.keys() - expected.keys()]
        if recorded and recorded.sha256 != expected[MANIFEST_LINK]:
            problems.append(
                f"{path}: its manifest is sha256:{expected[MANIFEST_LINK]}, "
                f"index.json says sha256:{recorded.sha256}; remove the one that is wrong"
            )
        return problems


def links_of(manifest: bytes) -> dict[str, str]:
    """Name → hex digest of what the folder of a version links to."""
    decoded = decode_manifest(manifest, "delta")
    files = {name: file.sha256 for name, file in decoded.files.items()}
    own = {INFO_LINK: decoded.info.sha256, MANIFEST_LINK: FileDigest.of(manifest).sha256}
    return {**files, **own}


def decode(manifest: bytes, info: bytes, *, where: Path | str) -> tuple[VersionManifest, DeltaInfo]:
    """A version's manifest and info, which fit together.

    Raises:
        RegistryError: damaged, of a newer schema, or with other files than its kind has.
    """
    decoded, about = decode_manifest(manifest, where), decode_info(info, where)
    if decoded.files.keys() != DELTA_FILES[about.kind]:
        raise RegistryError(
            f"{where}: lists {sorted(decoded.files)}, a delta of kind '{about.kind}' "
            f"has {sorted(DELTA_FILES[about.kind])}"
        )
    return decoded, about
