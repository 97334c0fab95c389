"""A stored delta sent to a remote, and one taken from it.

Called by the CLI. What travels is what lies in the store, to the byte: the manifest, the info and
the files. So a version has one digest everywhere.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from peftkit.errors import RegistryError
from peftkit.registry.digests import FileDigest
from peftkit.registry.layout import MAX_DOCUMENT_BYTES, VersionManifest, decode_manifest
from peftkit.registry.names import name_problem, shown
from peftkit.registry.reading import Contents, StoredDelta, decode
from peftkit.registry.remotes.address import Address, HubAddress, OciAddress, parse_address
from peftkit.registry.root import nearest_existing
from peftkit.registry.store import Registry
from peftkit.registry.versions import INFO_LINK

_COMMIT = re.compile(r"[0-9a-f]{40}")


class Remote(Protocol):
    """What both kinds of remote do."""

    def manifest(self) -> bytes:
        """The bytes of the manifest, of at most `MAX_DOCUMENT_BYTES`."""

    def blob(self, name: str, expected: FileDigest) -> bytes:
        """The verified bytes of one file."""

    def send(self, stored: StoredDelta, contents: Contents) -> str:
        """Send a version; returns the address that will always mean it."""


@dataclass(frozen=True)
class Pushed:
    """What was sent, and where it lies."""

    stored: StoredDelta
    remote: str
    pinned: str
    """The address that will always mean these bytes."""


def push(registry: Registry, reference: str, remote: str) -> Pushed:
    """Send a version, its bytes verified, to a remote.

    What the remote holds already is not sent again; a tag or branch there moves to this version.

    Raises:
        RegistryError: an unknown or damaged version, a bad address, or a remote that cannot be
            reached, refuses, or fails half-way; trying again goes on.
    """
    address = parse_address(remote)
    _check_movable(address)
    stored = registry.find(reference)
    contents = registry.contents(stored)
    with _opened(address) as opened:
        return Pushed(stored, str(address), opened.send(stored, contents))


def pull(registry: Registry, remote: str, *, save_as: str | None = None) -> StoredDelta:
    """Store what a remote holds as the next version of its name, or of `save_as`.

    A version of that name with the same bytes is returned as it is.

    Raises:
        RegistryError: a bad address or name, a remote that cannot be reached or fails half-way, no
            delta, damage, or a disk that refuses. Nothing is stored then.
    """
    address = parse_address(remote)
    name = save_as or address.name
    problem = name_problem(name)
    if problem:
        raise RegistryError(f"delta name {shown(name)}: {problem}; name it with --save-as")
    with _opened(address) as opened:
        data = opened.manifest()
        manifest = decode_manifest(data, str(address))
        _check_sizes(registry, manifest, address)
        info = opened.blob(INFO_LINK, manifest.info)
        decode(data, info, where=str(address))
        files = {file: opened.blob(file, digest) for file, digest in manifest.files.items()}
    return registry.receive(name, files, info=info, manifest=data)


def _check_movable(address: Address) -> None:
    """Refuse an address that means the same bytes for ever."""
    if isinstance(address, OciAddress) and address.digest:
        raise RegistryError(
            f"{address}: a digest follows from what is pushed; "
            f"name a tag, such as oci://{address.host}/{address.repository}:v1"
        )
    if isinstance(address, HubAddress) and _COMMIT.fullmatch(address.revision or ""):
        raise RegistryError(
            f"{address}: a commit follows from what is pushed; "
            f"name a branch, such as hf://{address.repository}@main"
        )


@contextmanager
def _opened(address: Address) -> Iterator[Remote]:
    if isinstance(address, HubAddress):
        from peftkit.registry.remotes.hub import open_hub

        with open_hub(address) as hub:
            yield hub
    else:
        from peftkit.registry.remotes.oci import open_oci

        with open_oci(address) as oci:
            yield oci


def _check_sizes(registry: Registry, manifest: VersionManifest, address: Address) -> None:
    """Refuse what would not fit, before any of it is fetched."""
    if manifest.info.size > MAX_DOCUMENT_BYTES:
        raise RegistryError(
            f"{address}: info of {manifest.info.size} bytes, "
            f"at most {MAX_DOCUMENT_BYTES} are allowed"
        )
    wanted = sum(file.size for file in manifest.files.values())
    free = shutil.disk_usage(nearest_existing(registry.root)).free
    if wanted > free:
        raise RegistryError(
            f"{address}: {wanted} bytes, {registry.root} has room for {free}; "
            "free some space or point PEFTKIT_REGISTRY at another disk"
        )
