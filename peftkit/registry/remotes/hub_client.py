"""huggingface_hub's own HTTP client, for the time of one push: quiet, guarded, with timeouts.

Called by `hub`. As it comes, that client waits for ever, sleeps as long as a server asks, sends the
token to whatever address of a file's upload a server names, and draws on stderr.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from logging import CRITICAL
from typing import TYPE_CHECKING

from peftkit.errors import RegistryError
from peftkit.registry.remotes.failures import CONNECT_SECONDS, READ_SECONDS, plain
from peftkit.registry.remotes.guard import Guard

if TYPE_CHECKING:
    from httpx2 import Client, Request, Response

TIMEOUT = {
    "connect": CONNECT_SECONDS,
    "read": READ_SECONDS,
    "write": READ_SECONDS,
    "pool": READ_SECONDS,
}


@contextmanager
def guarded_client(guard: Guard) -> Iterator[None]:
    """Let every request that huggingface_hub makes in this block, redirects included, pass `guard`.

    The client is one for the process: another thread's requests pass it as well.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    before = _http._GLOBAL_CLIENT_FACTORY

    def make() -> "Client":
        client = before()
        hooks = client.event_hooks
        client.event_hooks = {
            "request": [*hooks["request"], lambda request: _check(request, guard)],
            "response": [*hooks["response"], lambda response: _check_wait(response, guard)],
        }
        return client

    set_client_factory(make)
    try:
        with _quiet():
            yield
    finally:
        set_client_factory(before)


def _check(request: "Request", guard: Guard) -> None:
    url = str(request.url)
    guard.check(url)
    if not guard.is_origin(url):
        request.headers.pop("Authorization", None)
    request.extensions["timeout"] = TIMEOUT


def _check_wait(response: "Response", guard: Guard) -> None:
    if response.status_code == 429:
        wait = plain(response.headers.get("Retry-After", "some"))
        raise RegistryError(f"{guard.where}: too many requests; try again in {wait} seconds")


@contextmanager
def _quiet() -> Iterator[None]:
    from huggingface_hub.utils import logging
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    verbosity, drawn = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity(CRITICAL)
    disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as of its own way to call httpx2
            yield
    finally:
        logging.set_verbosity(verbosity)
        if drawn:
            enable_progress_bars()
