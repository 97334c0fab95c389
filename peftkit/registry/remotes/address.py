"""Where a remote copy lies: `oci://host/repository:tag` or `hf://org/name@revision`.

Called by `transfer`; imports no library of the network.
"""

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from peftkit.errors import RegistryError, suggestion
from peftkit.registry.names import shown
from peftkit.registry.remotes.guard import is_loopback

EXPECTED = {
    "oci": "oci://host/repository:tag or oci://host/repository@sha256: and 64 hex digits",
    "hf": "hf://org/name or hf://org/name@revision",
}
MAX_PORT = 65535

# Source: OCI distribution spec 1.1, "Pulling manifests".
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_OCI = re.compile(
    r"(?P<host>(?:[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\]))"
    r"(?::(?P<port>[0-9]{1,5}))?"
    rf"/(?P<repository>{_PART}(?:/{_PART})*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127})|@(?P<digest>sha256:[0-9a-f]{64}))"
)
# Source: `validate_repo_id` of huggingface_hub, and git's rules for names of branches.
_SEGMENT = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_HUB = re.compile(
    rf"(?!.*(?:--|\.\.))(?P<repository>{_SEGMENT}/{_SEGMENT}(?<!\.git))"
    r"(?:@(?P<revision>[A-Za-z0-9_](?:[A-Za-z0-9_./-]{0,252}[A-Za-z0-9_])?))?"
)


@dataclass(frozen=True)
class OciAddress:
    """One tag or digest of a repository in an OCI registry."""

    host: str
    """With the port, if one is named."""
    repository: str
    tag: str | None = None
    digest: str | None = None

    def __str__(self) -> str:
        selector = f"@{self.digest}" if self.digest else f":{self.tag}"
        return f"oci://{self.host}/{self.repository}{selector}"

    @property
    def name(self) -> str:
        """What a delta from here is called, unless it gets another name."""
        return self.repository.rpartition("/")[2]

    @property
    def url(self) -> str:
        """Scheme and host: plain HTTP on this machine only."""
        host = urlsplit(f"//{self.host}").hostname or ""
        return f"{'http' if is_loopback(host) else 'https'}://{self.host}"


@dataclass(frozen=True)
class HubAddress:
    """One revision of a model repository on the Hugging Face Hub."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"hf://{self.repository}{f'@{self.revision}' if self.revision else ''}"

    @property
    def name(self) -> str:
        """What a delta from here is called, unless it gets another name."""
        return self.repository.rpartition("/")[2]


Address = OciAddress | HubAddress


def parse_address(text: str) -> Address:
    """Read the address of a remote.

    Raises:
        RegistryError: an unknown scheme, or what follows it breaks the grammar.
    """
    scheme, separator, rest = text.partition("://")
    if not separator:
        raise RegistryError(
            f"remote {shown(text)}: no scheme; expected {EXPECTED['oci']}, or {EXPECTED['hf']}"
        )
    if scheme not in EXPECTED:
        raise RegistryError(
            f"remote {shown(text)}: unknown scheme {shown(scheme)}; {suggestion(scheme, EXPECTED)}"
        )
    found = _oci(rest) if scheme == "oci" else _hub(rest)
    if found is None:
        raise RegistryError(f"remote {shown(text)}: expected {EXPECTED[scheme]}")
    return found


def _oci(rest: str) -> OciAddress | None:
    match = _OCI.fullmatch(rest)
    if match is None or int(match["port"] or 1) not in range(1, MAX_PORT + 1):
        return None
    host = f"{match['host']}:{match['port']}" if match["port"] else match["host"]
    return OciAddress(host, match["repository"], match["tag"], match["digest"])


def _hub(rest: str) -> HubAddress | None:
    match = _HUB.fullmatch(rest)
    return HubAddress(match["repository"], match["revision"]) if match else None
