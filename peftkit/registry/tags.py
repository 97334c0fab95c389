"""Tags of a store: `tags/<name>@<tag>`, small files that hold a version such as `v3`.

Called by the store and its index. A tag may be moved; a version never changes.
"""

from pathlib import Path

from peftkit.errors import RegistryError
from peftkit.registry.names import listed, name_problem, version_number
from peftkit.registry.versions import Version
from peftkit.staging import fsync_path, write_file

_MAX_BYTES = 32


class Tags:
    """The tags of one store."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "tags"

    def all(self) -> dict[str, Version]:
        """`name@tag` → the version it means, sorted.

        Raises:
            RegistryError: the folder cannot be listed, or a file in it is no tag.
        """
        return {
            entry: self.read(entry) for entry in listed(self.folder) if not entry.startswith(".")
        }

    def read(self, entry: str) -> Version:
        """What `name@tag` means.

        Raises:
            RegistryError: no such tag, or a damaged one.
        """
        path = self.folder / entry
        name, _, tag = entry.partition("@")
        try:
            with path.open("rb") as stream:
                number = version_number(stream.read(_MAX_BYTES).decode().strip())
        except (OSError, ValueError) as error:
            raise RegistryError(f"{path}: unreadable tag; set it again") from error
        if number is None or name_problem(name) or name_problem(tag):
            raise RegistryError(f"{path}: expected a version such as 'v1'; set the tag again")
        return Version(name, number)

    def of(self, name: str) -> dict[str, Version]:
        """Tag → version for one name."""
        prefix = f"{name}@"
        entries = [e for e in listed(self.folder) if e.startswith(prefix)]
        return {entry.removeprefix(prefix): self.read(entry) for entry in entries}

    def set(self, version: Version, tag: str) -> None:
        """Let `tag` mean `version`, in one step.

        Raises:
            OSError: the disk refuses.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        write_file(self.folder / f"{version.name}@{tag}", f"v{version.number}\n".encode())

    def remove(self, name: str, tag: str) -> None:
        """Take a tag away; what it meant stays."""
        (self.folder / f"{name}@{tag}").unlink(missing_ok=True)
        fsync_path(self.folder)
