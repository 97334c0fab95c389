"""The store of deltas: an OCI image layout in which every version is written once and whole.

    oci-layout  index.json  blobs/sha256/<hex>     what any OCI tool reads
    deltas/<name>@v1/                              read-only links to the blobs of a version
    tags/  removed/                                small files
    staging/                                       saves in work
    cache.sqlite                                   may be deleted at any time

Called by the experiment, by loading and by the CLI; imports no tensor library.
Digests find damage, not forgery. There are no locks: writers compete for the rename that publishes
a version.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from peftkit.contracts import Delta
from peftkit.errors import RegistryError, suggestion
from peftkit.registry.base import base_of
from peftkit.registry.blobs import Blobs
from peftkit.registry.collect import Collected, collect
from peftkit.registry.digests import FileDigest
from peftkit.registry.index import Index, Listing
from peftkit.registry.layout import LAYOUT_FILE, check_layout, encode_layout, encode_manifest
from peftkit.registry.lookup import Lookup
from peftkit.registry.manifest import DeltaInfo, RunSummary, encode_info
from peftkit.registry.names import check_name, check_tag, parse_reference
from peftkit.registry.reading import Contents, Reader, StoredDelta, decode, links_of
from peftkit.registry.root import disk_hint, disk_refusal
from peftkit.registry.tags import Tags
from peftkit.registry.tensors import check_files, delta_from_files, delta_to_files, needs_base
from peftkit.registry.versions import Version, Versions
from peftkit.staging import discard, make_folder, write_file

if TYPE_CHECKING:
    from peftkit.registry.bit_delta import BaseTensors

__all__ = ["DeltaInfo", "Registry", "RunSummary", "StoredDelta"]


class Registry:
    """The deltas below one folder. Opening it reads and creates nothing."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.blobs = Blobs(root)
        self.versions = Versions(root)
        self.tags = Tags(root, self.versions)
        self.reader = Reader(self.blobs, self.versions)
        self.index = Index(root, read=self.reader.listed, restore=self.reader.restore)
        self.lookup = Lookup(self.index)

    def save(
        self, name: str, delta: Delta, info: DeltaInfo, *, base: Path | None = None
    ) -> StoredDelta:
        """Store `delta` as the next version of `name`, wholly or not at all.

        With the folder of its base, a delta of kind `weights` is kept as its difference to it.

        Raises:
            RegistryError: a bad name, an empty or non-finite delta, or a disk that refuses.
        """
        check_name(name)
        if info.kind != delta.kind:
            raise RegistryError(f"{name}: info says kind '{info.kind}', delta is '{delta.kind}'")
        files, about = delta_to_files(delta, base=_tensors_of(base)), encode_info(info)
        digests = {file: FileDigest.of(data) for file, data in files.items()}
        manifest = encode_manifest(FileDigest.of(about), digests)
        return self._add(name, files, info=about, manifest=manifest)

    def receive(
        self, name: str, files: Mapping[str, bytes], *, info: bytes, manifest: bytes
    ) -> StoredDelta:
        """Store what another store made, to the byte; the caller has hashed it.

        A version of `name` with the same manifest is returned as it is.

        Raises:
            RegistryError: it cannot be read as a delta, or a disk that refuses.
        """
        check_name(name)
        about = decode(manifest, info, where=self.root / name)[1]
        check_files(about.kind, files)
        sha256 = FileDigest.of(manifest).sha256
        for version in self.versions.of(name):
            if self.versions.manifest(version) == sha256:
                stored = self.reader.stored(version)
                self.verify(stored)
                return stored
        return self._add(name, files, info=info, manifest=manifest)

    def _add(
        self, name: str, files: Mapping[str, bytes], *, info: bytes, manifest: bytes
    ) -> StoredDelta:
        decoded, about = decode(manifest, info, where=self.root / name)
        contents = {digest: files[file] for file, digest in decoded.files.items()}
        contents |= {FileDigest.of(data): data for data in (info, manifest)}
        check_layout(self.root)
        with disk_refusal(self.root, f"'{name}' not saved, nothing was stored"):
            version = self._publish(name, contents, links_of(manifest))
        self._after(f"{version}: stored and whole")
        digest = f"sha256:{FileDigest.of(manifest).sha256}"
        path = self.versions.path(version)
        return StoredDelta(name, f"v{version.number}", path, about, decoded.files, digest)

    def find(self, reference: str) -> StoredDelta:
        """The version that `name`, `name@v2`, `name@TAG` or `name@sha256:…` means.

        Reads its manifest and its info only.

        Raises:
            RegistryError: no such delta or version, or an unreadable one. A damaged newest
                version is never passed over for an older one.
        """
        check_layout(self.root)
        return self.reader.stored(self.lookup.version(parse_reference(reference)))

    def verify(self, stored: StoredDelta) -> None:
        """Read every file of a version and compare it with the manifest.

        Raises:
            RegistryError: one line for each changed, missing or stray file.
        """
        self._checked(stored, keep=False)

    def read_delta(self, stored: StoredDelta, *, base: Path | None = None) -> Delta:
        """The delta, its tensors made from the very bytes that were verified.

        A delta that is kept as a difference needs the folder of its base; without one the base is
        looked for where the run found it.

        Raises:
            RegistryError: as for `verify`, another base, or a file that is not what its name says.
            SourceError: the base cannot be found.
        """
        files, kind = self._checked(stored, keep=True), stored.info.kind
        if needs_base(kind, files) and base is None:
            base = base_of(stored)
        return delta_from_files(kind, files, base=_tensors_of(base))

    def contents(self, stored: StoredDelta) -> Contents:
        """The verified bytes of a version, to be sent elsewhere.

        Raises:
            RegistryError: as for `verify`.
        """
        files = self._checked(stored, keep=True)
        manifest, info = self.reader.documents(stored.digest.removeprefix("sha256:"))
        return Contents(files, info=info, manifest=manifest)

    def ls(self) -> Listing:
        """Every version with what a table shows of it, and the problems.

        Raises:
            RegistryError: the store cannot be listed.
        """
        check_layout(self.root)
        return self.index.listing()

    def tag(self, reference: str, tag: str, *, move: bool = False) -> StoredDelta:
        """Let `name@tag` mean a version.

        Raises:
            RegistryError: an unknown version, a bad tag, or one that means another version and
                is not to be moved.
        """
        check_tag(tag)
        stored = self.find(reference)
        version = Version(stored.name, int(stored.version[1:]))
        meant = version if move else self.tags.of(stored.name).get(tag, version)
        if meant != version:
            raise RegistryError(
                f"{stored.name}@{tag}: means v{meant.number} already; move it with --force, "
                "or take another tag"
            )
        with disk_refusal(
            self.root,
            f"'{stored.name}@{tag}' not set",
            done=f"'{stored.name}@{tag}' is set",
            is_done=lambda: self.tags.of(stored.name).get(tag) == version,
        ):
            self.tags.set(version, tag)
        self._after(f"{stored.name}@{tag}: set")
        return stored

    def untag(self, name: str, tag: str) -> None:
        """Take a tag away.

        Raises:
            RegistryError: no such tag.
        """
        check_name(name)
        check_tag(tag)
        if not self.tags.has(name, tag):
            known = suggestion(tag, self.tags.of(name))
            raise RegistryError(f"{self.root}: no tag '{name}@{tag}'; {known}")
        with disk_refusal(
            self.root,
            f"'{name}@{tag}' not removed",
            done=f"'{name}@{tag}' is removed",
            is_done=lambda: not self.tags.has(name, tag),
        ):
            self.tags.remove(name, tag)
        self._after(f"{name}@{tag}: removed")

    def rm(self, reference: str) -> list[str]:
        """Remove a version and its tags, or every version where only a name is given.

        Its blobs stay until `gc`; its number is never used again. Damaged versions go as well. One
        mark removes a version, and a tag of a removed version means nothing: no state lies between.

        Returns:
            `name@v1` of each removed version, then its tags.

        Raises:
            RegistryError: nothing of that name, or a disk that refuses.
        """
        check_layout(self.root)
        wanted = parse_reference(reference)
        found = self.lookup.version(wanted)
        chosen = self.lookup.versions_of(wanted.name) if "@" not in reference else [found]
        tags = [tag for tag, version in self.tags.of(found.name).items() if version in chosen]
        with disk_refusal(
            self.root,
            f"'{reference}' not removed, or not all of it",
            done=f"'{reference}' is removed",
            is_done=lambda: all(map(self.versions.is_gone, chosen)),
        ):
            for version in chosen:
                self.versions.remove(version)
        self._after(f"{reference}: removed")
        return [*map(str, chosen), *(f"{found.name}@{tag}" for tag in tags)]

    def gc(self, *, dry_run: bool = False) -> Collected:
        """Delete blobs that no version needs, and what crashes left behind.

        Raises:
            RegistryError: the store cannot be listed, or a disk that refuses.
        """
        check_layout(self.root)
        self.index.listing()  # gives versions that only index.json knows their folders
        with disk_refusal(self.root, "not all was removed"):
            return collect(self.root, dry_run=dry_run)

    def _checked(self, stored: StoredDelta, *, keep: bool) -> dict[str, bytes]:
        version = Version(stored.name, int(stored.version[1:]))
        recorded = self.index.document.manifest_of(version)
        return self.reader.checked_files(stored, recorded=recorded, keep=keep)

    def _publish(
        self, name: str, contents: dict[FileDigest, bytes], links: dict[str, str]
    ) -> Version:
        make_folder(self.root)
        if not (self.root / LAYOUT_FILE).exists():
            write_file(self.root / LAYOUT_FILE, encode_layout())
        newest, certain = self.index.newest_number(name)
        staging = self.versions.stage(links)
        try:
            self.blobs.put(contents)
            version = self.versions.publish(staging, name, after=newest, likely=certain)
        except BaseException as error:  # also Ctrl-C: nothing half-written stays
            if isinstance(error, OSError) and not staging.exists():
                raise RegistryError(
                    f"{self.versions.folder}: '{name}' is stored and whole, but a power cut may "
                    f"still undo it ({error.strerror or error}); check the disk, then verify it"
                ) from error
            discard(staging)
            raise
        # A `gc` that had looked before the links were there may have taken a blob since.
        self.blobs.put({d: data for d, data in contents.items() if not self.blobs.has(d)})
        return version

    def _after(self, done: str) -> None:
        """Bring `index.json` up to date; what was done stays done if that fails."""
        try:
            self.index.update()
        except OSError as error:
            raise RegistryError(
                f"{done}, but {self.index.file} is behind ({error.strerror or error}); "
                f"{disk_hint(error)}, then list the store"
            ) from error
        except RegistryError as error:
            raise RegistryError(
                f"{done}, but {self.index.file} is behind: {error.problems[0]}"
            ) from error


def _tensors_of(base: Path | None) -> "BaseTensors | None":
    if base is None:
        return None
    from peftkit.modeling.base_tensors import BaseTensors

    return BaseTensors(base)
