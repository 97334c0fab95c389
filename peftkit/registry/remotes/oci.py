"""Deltas in an OCI registry, through oras.

Called by `transfer`. oras gives the URLs, the login of `~/.docker/config.json` and the dance for a
token. It does not send a request of its own: it would try five times over two minutes, without a
timeout, write a body to disk before its size is known, and encode a manifest anew.
"""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin

from peftkit.errors import RegistryError
from peftkit.registry.digests import FileDigest
from peftkit.registry.layout import INDEX_TYPE, MANIFEST_TYPE, MAX_DOCUMENT_BYTES
from peftkit.registry.reading import Contents, StoredDelta
from peftkit.registry.remotes.address import OciAddress
from peftkit.registry.remotes.failures import contained, plain
from peftkit.registry.remotes.guard import Guard
from peftkit.registry.remotes.web import at_most, body_of, exactly, guarded_session

if TYPE_CHECKING:
    from requests import Response, Session

_DIGEST_HEADER = "Docker-Content-Digest"
_BINARY = {"Content-Type": "application/octet-stream"}
_DOCKER = "application/vnd.docker.distribution.manifest"
# What is no delta is asked for as well, so that it can be told from what is not there.
_ACCEPTED = {"Accept": f"{MANIFEST_TYPE}, {INDEX_TYPE}, {_DOCKER}.v2+json, {_DOCKER}.list.v2+json"}


@contextmanager
def open_oci(address: OciAddress) -> "Iterator[OciRemote]":
    """The remote at an address; its connections end with the block."""
    guard = Guard(address, address.url)
    with guarded_session(guard) as session:
        yield OciRemote(address, guard, session)


class OciRemote:
    """One tag or digest of one repository."""

    def __init__(self, address: OciAddress, guard: Guard, session: "Session") -> None:
        """Reads the login.

        Raises:
            RegistryError: a login that cannot be read.
        """
        self.address = address
        self._guard = guard
        self._session = session
        self._authorization: str | None = None
        with contained(f"{address}: login of ~/.docker/config.json"):
            self._client, self._container = _oras(address, session)
        self._client.do_request = self._request

    def manifest(self) -> bytes:
        """The bytes of the manifest.

        Raises:
            RegistryError: unreachable, unknown, too large, or not what the digest says.
        """
        response = self._request(self._url("manifest"), headers=_ACCEPTED, stream=True)
        with response:
            data = at_most(self._body(response), MAX_DOCUMENT_BYTES, where=f"{self.address}")
        expected = self.address.digest or response.headers.get(_DIGEST_HEADER)
        found = f"sha256:{FileDigest.of(data).sha256}"
        if expected not in (None, found):
            raise RegistryError(
                f"{self.address}: manifest changed, expected {plain(expected)}, found {found}; "
                "push it again or pull another"
            )
        return data

    def blob(self, name: str, expected: FileDigest) -> bytes:
        """The verified bytes of the file `name`.

        Raises:
            RegistryError: unreachable, missing, or other bytes than expected.
        """
        digest = f"sha256:{expected.sha256}"
        with self._client.get_blob(self._container, digest, stream=True) as response:
            return exactly(self._body(response), expected, where=f"{self.address}: {name}")

    def send(self, stored: StoredDelta, contents: Contents) -> str:
        """Send what the registry lacks, the manifest last.

        Returns:
            The address by digest.

        Raises:
            RegistryError: unreachable, refused, or cut off; what was sent is kept.
        """
        manifest = contents.manifest_digest.sha256
        for sha256, data in contents.by_digest().items():
            layer = {"digest": f"sha256:{sha256}"}
            if sha256 != manifest and not self._client.blob_exists(layer, self._container):
                self._upload(layer["digest"], data)
        headers = {"Content-Type": MANIFEST_TYPE}
        answer = self._request(
            self._url("manifest"), "PUT", data=contents.manifest, headers=headers
        )
        kept = answer.headers.get(_DIGEST_HEADER, stored.digest)
        if kept != stored.digest:
            raise RegistryError(
                f"{self.address}: the registry changed the manifest, "
                f"expected {stored.digest}, found {plain(kept)}"
            )
        return str(OciAddress(self.address.host, self.address.repository, digest=kept))

    def _upload(self, digest: str, data: bytes) -> None:
        from oras.utils import append_url_params

        start = self._request(self._url("upload_blob"), "POST", headers=_BINARY)
        with contained(self.address):
            place = urljoin(start.url, start.headers["Location"])
            place = append_url_params(place, {"digest": digest})
        self._request(place, "PUT", data=data, headers=_BINARY)

    def _url(self, what: str) -> str:
        return f"{self._client.prefix}://{getattr(self._container, f'{what}_url')()}"

    def _body(self, response: "Response") -> Iterator[bytes]:
        with contained(self.address):
            yield from body_of(response)

    def _request(
        self,
        url: str,
        method: str = "GET",
        *,
        data: bytes | None = None,
        headers: dict[str, str] | None = None,
        stream: bool = False,
    ) -> "Response":
        """Stands in for oras' own: one try, a login where it is asked for, errors raised here.

        Raises:
            RegistryError: any answer but success, and but 404 to a HEAD.
        """
        with contained(self.address):
            response = self._once(url, method, data=data, headers=headers, stream=stream)
            if response.status_code in (401, 403) and self._log_in(response):
                response = self._once(url, method, data=data, headers=headers, stream=stream)
            absent = (method, response.status_code) == ("HEAD", 404)
            if response.status_code // 100 != 2 and not absent:
                raise RegistryError(f"{self.address}: {self._refusal(response)}")
            return response

    def _once(
        self,
        url: str,
        method: str,
        *,
        data: bytes | None,
        headers: dict[str, str] | None,
        stream: bool,
    ) -> "Response":
        sent = dict(headers or {})
        if self._authorization and self._guard.is_origin(url):
            sent["Authorization"] = self._authorization
        # As a stream: bytes would be sent in one call, all of it within the time to connect.
        body = None if data is None else io.BytesIO(data)
        return self._session.request(method, url, data=body, headers=sent, stream=stream)

    def _log_in(self, response: "Response") -> bool:
        """Whether there is something new to try. oras takes a Basic challenge for a token's."""
        if not self._guard.is_origin(response.url):
            return False  # another host would name a server of its own for the password
        challenge = response.headers.get("WWW-Authenticate", "")
        before = self._authorization
        if challenge.lower().startswith("basic"):
            secret = getattr(self._client.auth, "_basic_auth", None)
            self._authorization = f"Basic {secret}" if secret else None
        elif challenge.lower().startswith("bearer"):
            found, _ = self._client.auth.authenticate_request(response, {}, refresh=True)
            self._authorization = found.get("Authorization")
        return self._authorization not in (None, before)

    def _refusal(self, response: "Response") -> str:
        code, detail = _told(response)
        status = f"HTTP {response.status_code}{f', {detail}' if detail else ''}"
        host = self.address.host
        if response.status_code == 401:
            login = f"`docker login {host}` or `oras login {host}`"
            return f"authentication needed ({status}); log in with {login}"
        if response.status_code == 403:
            return f"access denied ({status}); log in as someone who may: `docker login {host}`"
        if code == "NAME_UNKNOWN":
            return f"no such repository ({status}); check the address"
        if code == "MANIFEST_UNKNOWN":
            return f"no such tag or digest ({status}); check the address"
        return f"the registry refused {response.request.method} ({status}); try again later"


def _told(response: "Response") -> tuple[str, str]:
    """Code and text of the first error of an OCI answer."""
    try:
        first = response.json()["errors"][0]
        code = plain(first["code"])
        return code, plain(f"{code}: {first.get('message', '')}")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return "", plain(response.reason or "")


def _oras(address: OciAddress, session: "Session") -> tuple[Any, Any]:
    """A client and a container of oras that know the address and the login for it."""
    from oras.container import Container
    from oras.provider import Registry

    # Without a handler, its warnings would go to stderr.
    logging.getLogger("oras.logger").setLevel(logging.CRITICAL)
    client = Registry(hostname=address.host, insecure=address.url.startswith("http:"))
    client.session.close()
    client.session = client.auth.session = session
    # oras would guess where the host ends: 'localhost/a' has none for it, 'a.b/c' is all host.
    container = Container("repository", registry=address.host)
    container.repository, container.tag = address.repository, address.tag
    container.digest = address.digest
    client.auth.load_configs(container)
    return client, container
