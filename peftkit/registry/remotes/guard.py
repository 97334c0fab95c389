"""Which hosts one transfer may speak to.

Called by `web` and `hub_client` before each request, redirects included; imports no HTTP library.
A remote may send its client on to another host: to a store of blobs, to a server of tokens. It may
not send it into the network that the client alone can reach.
"""

import socket
from ipaddress import IPv6Address, ip_address
from urllib.parse import urlsplit

from peftkit.errors import RegistryError

PORTS = {"http": 80, "https": 443}


class Guard:
    """The remote that the user named, and the kinds of address that may follow from it."""

    def __init__(self, where: object, url: str) -> None:
        """`where` begins each message; `url` is the remote's own.

        Raises:
            RegistryError: plain HTTP to another machine.
        """
        self.where = where
        self.origin = _origin(url)
        self.check(url)

    def is_origin(self, url: str) -> bool:
        """Whether `url` has the scheme, host and port of the remote: only then a login is sent."""
        return _origin(url) == self.origin

    def check(self, url: str, *, resolve: bool = True) -> None:
        """Refuse plain HTTP to another machine, and a host that is further inside than the remote.

        Without `resolve`, for a proxy that does it, a host is judged only if it is an address.

        Raises:
            RegistryError: as said; nothing was sent.
        """
        scheme, host, _ = _origin(url)
        if scheme != "https" and not (scheme == "http" and is_loopback(host)):
            raise RegistryError(
                f"{self.where}: {_place(url)} is not https; plain http is for this machine only"
            )
        if resolve or _is_address(host):
            for address in addresses_of(host):
                self.check_peer(host, address)

    def check_peer(self, host: str, address: str) -> None:
        """Refuse an IP address to which `host` leads, unless `host` is the remote itself.

        Raises:
            RegistryError: an address of another kind than public and the remote's own.
        """
        if host == self.origin[1]:
            return
        found, allowed = kind_of(address), {"public", *map(kind_of, addresses_of(self.origin[1]))}
        if found not in allowed:
            raise RegistryError(
                f"{self.where}: leads to {host} at the {found} address {address}; refused, "
                f"from there only {' and '.join(sorted(allowed))} addresses are allowed"
            )


def kind_of(address: str) -> str:
    """`public`, `private`, `link-local` or `loopback`."""
    parsed = ip_address(address.partition("%")[0])
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped:
        parsed = parsed.ipv4_mapped
    if parsed.is_loopback or parsed.is_unspecified:  # Linux takes 0.0.0.0 for itself
        return "loopback"
    if parsed.is_link_local:
        return "link-local"
    return "public" if parsed.is_global else "private"


def is_loopback(host: str) -> bool:
    """Whether a host, without a port, is this machine by its name alone."""
    return host == "localhost" or (_is_address(host) and ip_address(host).is_loopback)


def addresses_of(host: str) -> list[str]:
    """Every IP address of a host; none if it has none, which connecting to it will say."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return sorted({str(entry[4][0]) for entry in found})


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or PORTS.get(parts.scheme)


def _place(url: str) -> str:
    """Scheme and host only: what follows may be signed."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
