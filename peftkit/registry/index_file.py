"""`index.json` of a store as it lies on the disk, read without the store.

Called by the index and the lookup; imports no tensor library. Decoding ten thousand entries takes
far longer than looking for one, so what is asked for one name or version is searched in the text.
"""

import json
import os
import re
from pathlib import Path

from peftkit.errors import RegistryError
from peftkit.registry.digests import FileDigest
from peftkit.registry.layout import INDEX_FILE, REFERENCE, check_index, decode_index
from peftkit.registry.root import unreadable
from peftkit.registry.versions import Version


class IndexFile:
    """What `index.json` says."""

    def __init__(self, root: Path) -> None:
        self.path = root / INDEX_FILE

    def entries(self) -> dict[str, FileDigest]:
        """Reference → digest of its manifest, as `index.json` says.

        Raises:
            RegistryError: it cannot be read.
        """
        try:
            return decode_index(self.path.read_bytes(), self.path)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise unreadable(self.path, "read", error) from error

    def versions_of(self, name: str) -> set[Version]:
        """The versions of a name that `index.json` lists; none if it was not peftkit's, or changed.

        Decoding ten thousand entries would take far longer.
        """
        try:
            data = self.path.read_bytes()
            check_index(data, self.path)
        except (OSError, RegistryError):
            return set()
        wanted = rf'"{re.escape(REFERENCE)}": "{re.escape(name)}@v([1-9][0-9]{{0,8}})"'
        return {Version(name, int(number)) for number in re.findall(wanted.encode(), data)}

    def manifest_of(self, version: Version) -> FileDigest | None:
        """What `index.json` says of one version; None where it does not know it.

        Raises:
            RegistryError: it cannot be read.
        """
        try:
            data = self.path.read_bytes()
        except OSError:
            return None
        check_index(data, f"{self.path} (remove it, and the next save or tag writes it anew)")
        place = data.find(f'"{REFERENCE}": "{version}"'.encode())
        line = data[data.rfind(b"\n", 0, place) + 1 : data.find(b"\n", max(place, 0))]
        try:  # written by peftkit: one entry a line
            return manifest_in(line.rstrip(b",").decode())
        except (KeyError, TypeError, ValueError):
            return decode_index(data, self.path).get(str(version))

    def identity(self) -> str:
        """Says whether `index.json` is still the file that was last read or written."""
        try:
            found = os.stat(self.path)
        except OSError:
            return ""
        return f"{found.st_ino} {found.st_mtime_ns} {found.st_size}"


def manifest_in(line: str) -> FileDigest:
    """The digest that a line of `index.json` gives for a manifest."""
    entry = json.loads(line)
    return FileDigest(size=entry["size"], sha256=entry["digest"].removeprefix("sha256:"))
