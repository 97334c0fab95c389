"""HTTP with limits: which hosts, how long, how many bytes.

Called by `oci` and `hub`; imports requests inside its functions.
"""

import io
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from peftkit.errors import RegistryError
from peftkit.registry.digests import FileDigest
from peftkit.registry.layout import MAX_DOCUMENT_BYTES
from peftkit.registry.remotes.failures import CONNECT_SECONDS, READ_SECONDS
from peftkit.registry.remotes.guard import Guard, is_loopback

if TYPE_CHECKING:
    from requests import PreparedRequest, Response, Session
    from requests.adapters import HTTPAdapter

MAX_REDIRECTS = 5
MIN_BYTES_PER_SECOND = 4096
"""How slow a body may come once `READ_SECONDS` have passed: a byte a minute is no transfer."""

_CHUNK_BYTES = 1 << 20


def guarded_session(guard: Guard) -> "Session":
    """A session that asks `guard` before each request and before each connection's first byte.

    Its bodies are never unpacked, so that a limit counts what arrives.
    """
    from http.cookiejar import DefaultCookiePolicy

    import requests

    session = requests.Session()
    session.headers["Accept-Encoding"] = "identity"
    session.max_redirects = MAX_REDIRECTS
    session.auth = lambda request: request  # or ~/.netrc would take the place of a token
    # Harbor takes a cookie for a sign of a browser.
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    adapter = _adapter(guard)
    session.mount("https://", adapter)
    session.mount("http://", adapter)
    return session


def _adapter(guard: Guard) -> "HTTPAdapter":
    from requests.adapters import HTTPAdapter
    from requests.utils import select_proxy

    class Guarded(HTTPAdapter):
        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            super().init_poolmanager(*args, **kwargs)
            self.poolmanager.pool_classes_by_scheme = _pools(guard)

        def send(
            self,
            request: "PreparedRequest",
            stream: bool = False,
            timeout: Any = None,
            verify: Any = True,
            cert: Any = None,
            proxies: dict[str, str] | None = None,
        ) -> "Response":
            """As of requests, but judged first, timed, and bounded where it would read all."""
            url = str(request.url)
            if is_loopback(urlsplit(url).hostname or ""):
                proxies = None  # to a proxy, that name means the proxy's own machine
            guard.check(url, resolve=not select_proxy(url, proxies))
            limits = (CONNECT_SECONDS, READ_SECONDS)
            response = super().send(request, True, limits, verify, cert, proxies)
            # requests would read these whole, whatever their size: a redirect's body, an error's,
            # and the answer of a server of tokens.
            if not stream or response.status_code >= 300:
                response.raw = io.BytesIO(_beginning(response))
            return response

    return Guarded()


def _pools(guard: Guard) -> dict[str, Any]:
    """urllib3's pools, with connections that know to whom they lead before they send.

    A name that was looked up once may mean another address when it is looked up again.
    """
    from urllib3.connection import HTTPConnection, HTTPSConnection
    from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

    def checked(connection: HTTPConnection, made: Any) -> Any:
        try:
            guard.check_peer(connection.host, made.getpeername()[0])
        except BaseException:  # also Ctrl-C: the socket is nobody's yet
            made.close()
            raise
        return made

    class Plain(HTTPConnection):
        def _new_conn(self) -> Any:
            return checked(self, super()._new_conn())

    class Tls(HTTPSConnection):
        def _new_conn(self) -> Any:
            return checked(self, super()._new_conn())

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class TlsPool(HTTPSConnectionPool):
        ConnectionCls = Tls

    return {"http": PlainPool, "https": TlsPool}


def body_of(response: "Response") -> Iterator[bytes]:
    """The body as it comes; it ends early where the connection does."""
    from urllib3.exceptions import HTTPError, ReadTimeoutError

    try:
        while chunk := response.raw.read1(_CHUNK_BYTES, decode_content=False):
            yield chunk
    except ReadTimeoutError:
        raise
    except (HTTPError, OSError):
        return


def at_most(chunks: Iterable[bytes], limit: int, *, where: str) -> bytes:
    """All of a body of unknown size.

    Raises:
        RegistryError: more than `limit` bytes, or so slow that it would never end.
    """
    taken, size, start = [], 0, time.monotonic()
    for chunk in chunks:
        size += len(chunk)
        if size > limit:
            raise RegistryError(f"{where}: more than {limit} bytes; refused")
        if time.monotonic() - start > READ_SECONDS + size / MIN_BYTES_PER_SECOND:
            raise RegistryError(
                f"{where}: slower than {MIN_BYTES_PER_SECOND} bytes a second; try again"
            )
        taken.append(chunk)
    return b"".join(taken)


def exactly(chunks: Iterable[bytes], expected: FileDigest, *, where: str) -> bytes:
    """A body whose size and digest are known.

    Raises:
        RegistryError: larger, cut short, too slow, or other bytes.
    """
    data = at_most(chunks, expected.size, where=where)
    if len(data) < expected.size:
        raise RegistryError(
            f"{where}: cut short, expected {expected.size} bytes, found {len(data)}; try again"
        )
    found = FileDigest.of(data)
    if found != expected:
        raise RegistryError(
            f"{where}: changed, expected {expected}, found {found}; push it again or pull another"
        )
    return data


def _beginning(response: "Response") -> bytes:
    """As much of a body as a message or a token may have; the rest is left."""
    taken = b""
    try:
        for chunk in body_of(response):
            taken += chunk
            if len(taken) >= MAX_DOCUMENT_BYTES:
                break
    finally:
        response.raw.close()
    return taken[:MAX_DOCUMENT_BYTES]
