"""What a library of the network raised, as one line.

Called by `oci` and `hub` around what is not peftkit's.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from peftkit.errors import RegistryError

CONNECT_SECONDS = 10
READ_SECONDS = 60
"""How long a remote may say nothing while it sends or takes bytes."""
MAX_CHARACTERS = 200


@contextmanager
def contained(where: object) -> Iterator[None]:
    """Turn whatever a library raises into one `RegistryError` that begins with `where`.

    oras raises bare ValueError, KeyError and AttributeError on what a registry sends, and its
    logger can end the process.

    Raises:
        RegistryError: also one that was raised inside a library's own handler.
    """
    try:
        yield
    except RegistryError:
        raise
    except (Exception, SystemExit) as error:
        own = [e.problems for e in chain(error) if isinstance(e, RegistryError)]
        raise RegistryError(own[0] if own else f"{where}: {_said(error)}") from error


def plain(text: object) -> str:
    """One short line without control characters, whatever a remote sent."""
    words = "".join(c if c.isprintable() else " " for c in str(text)).split()
    return " ".join(words)[:MAX_CHARACTERS]


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came from, outermost first."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def _said(error: BaseException) -> str:
    names = [type(e).__name__ for e in chain(error)]
    if any("Timeout" in name for name in names):
        return "no answer in time; check the network, then try again"
    if "TooManyRedirects" in names:
        return "redirects without end; check the address"
    reasons = [e.strerror for e in chain(error) if isinstance(e, OSError) and e.strerror]
    root = list(chain(error))[-1]
    reason = plain(reasons[-1] if reasons else root) or type(root).__name__
    if any(name in ("NewConnectionError", "NameResolutionError", "ConnectError") for name in names):
        return f"cannot be reached ({reason}); check the address and the network"
    if any(isinstance(e, OSError) for e in chain(error)):
        return f"the connection failed ({reason}); try again"
    return f"answers what cannot be understood ({reason})"
