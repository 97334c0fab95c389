"""From a reference to the version that it means.

Called by the store; imports no tensor library.
"""

from peftkit.errors import RegistryError, suggestion
from peftkit.registry.index import Index
from peftkit.registry.names import Reference
from peftkit.registry.versions import Version


class Lookup:
    """Finds versions of one store by name, number, tag or digest."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.root, self.versions, self.tags = index.root, index.versions, index.tags

    def version(self, wanted: Reference) -> Version:
        """The version that a reference means.

        Raises:
            RegistryError: no such name, version, tag or digest; says what there is.
        """
        known = self.versions_of(wanted.name)
        if not known:
            names = self.versions.names()
            hint = suggestion(wanted.name, names) if names else "the registry is empty"
            raise RegistryError(f"{self.root}: no delta '{wanted.name}'; {hint}")
        if wanted.digest:
            return self._by_digest(wanted.digest, known)
        selector = wanted.version or wanted.tag
        if selector is None:
            return known[-1]
        numbered = {f"v{version.number}": version for version in known}
        tagged = self.tags.read(f"{wanted.name}@{wanted.tag}") if wanted.tag else None
        found = numbered.get(selector, tagged)
        if found is None:
            choices = [*numbered, *self.tags.of(wanted.name)]
            raise RegistryError(
                f"{self.root}: '{wanted.name}' has no version or tag '{selector}'; "
                f"{suggestion(selector, choices)}"
            )
        return found

    def versions_of(self, name: str) -> list[Version]:
        """The versions of a name, oldest first; also those whose folder was lost for good.

        Otherwise an older version would pass for the newest.
        """
        recorded = self.index.document.versions_of(name)
        known = {*self.versions.of(name)}
        lost = {version for version in recorded - known if not self.versions.is_gone(version)}
        if lost or (not known and self.index.file.exists()):
            self.index.listing()  # makes them anew, also in a store that another tool copied
            known = {*self.versions.of(name)} | lost
        return sorted(known)

    def _by_digest(self, digest: str, known: list[Version]) -> Version:
        for version in reversed(known):
            if f"sha256:{self.versions.manifest(version)}" == digest:
                return version
        raise RegistryError(f"{self.root}: '{known[0].name}' has no version of digest {digest}")
