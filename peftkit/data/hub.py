"""Find a model or a data set on the Hub or in its local cache, and read such a data set.

Called by `sources`; imports `located` and the bottom of the order. Whether the Hub answers is
probed first, for its client would retry for half a minute.
"""

import os
import re
import socket
import threading
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from peftkit.data.located import Located, Request, check_folder, one_line
from peftkit.errors import SourceError

if TYPE_CHECKING:
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

PROBE_SECONDS = 3.0
HUB_NAME = re.compile(r"(?!.*\.\.)\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_MODEL_FILES = [
    *("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "tokenizer*"),
    *("*.bpe", "*.codes", "*.spm", "*.tokenizer"),
]


def hub_reachable() -> bool:
    """True if the Hub may be asked; answers within three seconds, where its client retries."""
    return _hub_obstacle() is None


def from_hub(request: Request) -> Located | str:
    """What the Hub has, else its local cache; a string says why neither does.

    Raises:
        SourceError: a model's snapshot is there and unusable.
    """
    if not HUB_NAME.fullmatch(request.name):
        return f"Hub: '{request.name}' is not of the form <org>/<name>"
    obstacle = _hub_obstacle()
    if obstacle is None:
        try:
            return _fetched(request)
        except SourceError:
            raise
        except Exception as error:  # The client raises from several libraries, no common base.
            obstacle = one_line(error)
    cached = _cached_model(request) if request.kind == "models" else _cached_dataset(request)
    return cached if isinstance(cached, Located) else f"Hub: {obstacle}; local cache: {cached}"


def hub_dataset(located: Located) -> "datasets.DatasetDict":
    """All splits of a data set that `from_hub` found, at the commit that it found.

    Raises:
        SourceError: whatever the libraries raise, in one line.
    """
    from datasets import load_dataset

    try:
        if str(located.path).startswith("hub:"):
            return load_dataset(located.name, located.config, revision=located.revision)
        config, version, commit = located.path.parts[-3:]
        return _cache_reader(located.name, config, version=version, commit=commit).as_dataset()
    except Exception as error:  # As in `from_hub`.
        raise SourceError(f"data set '{located.name}' of the Hub: {one_line(error)}") from error


def _hub_obstacle() -> str | None:
    from huggingface_hub import constants

    wanted_offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    if wanted_offline or constants.HF_HUB_OFFLINE:
        return "not asked, HF_HUB_OFFLINE is set"
    endpoint = urlsplit(constants.ENDPOINT)
    proxies, host = urllib.request.getproxies(), endpoint.hostname or ""
    proxy = proxies.get(endpoint.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(host):
        endpoint = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = endpoint.port or (443 if endpoint.scheme == "https" else 80)
    return None if _answers(endpoint.hostname or "", port) else f"{endpoint.netloc} does not answer"


def _answers(host: str, port: int) -> bool:
    """True if a connection opens in time; a thread, for a name look-up heeds no timeout."""
    answered = threading.Event()

    def connect() -> None:
        with (
            suppress(OSError, ValueError),
            socket.create_connection((host, port), timeout=PROBE_SECONDS),
        ):
            answered.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answered.is_set()


def _fetched(request: Request) -> Located:
    from huggingface_hub import HfApi

    if request.kind == "models":
        folder = _snapshot(request, local_files_only=False)
        check_folder("models", folder)
        return request.found(folder, "hub", folder.name)
    info = HfApi().dataset_info(request.name, revision=request.revision, timeout=10)
    return request.found(Path(f"hub:{request.name}"), "hub", info.sha)


def _snapshot(request: Request, *, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        request.name,
        revision=request.revision,
        local_files_only=local_files_only,
        allow_patterns=_MODEL_FILES,
        ignore_patterns=["*/*"],
    )
    return Path(folder)


def _cached_model(request: Request) -> Located | str:
    try:
        folder = _snapshot(request, local_files_only=True)
    except (OSError, ValueError):
        return "no whole snapshot"
    # Reading a config alone leaves such a snapshot: that is no damage, only not the model.
    if not (folder / "config.json").exists() or not any(folder.glob("*.safetensors")):
        return "a snapshot without config.json or *.safetensors"
    check_folder("models", folder)
    return request.found(folder, "hub", folder.name)


def _cached_dataset(request: Request) -> Located | str:
    from huggingface_hub import try_to_load_from_cache

    name, commit = request.name, request.revision
    try:
        cache = _cache_reader(name, request.config, version="auto", commit="auto")
    except (ValueError, OSError) as error:
        return one_line(error)
    if commit:
        card = try_to_load_from_cache(name, "README.md", revision=commit, repo_type="dataset")
        commit = Path(card).parent.name if isinstance(card, str) else commit
        if commit != cache.hash:
            return f"holds revision {cache.hash}, not {request.revision}"
    return request.found(Path(cache.cache_dir), "hub", cache.hash)


def _cache_reader(name: str, config: str | None, *, version: str, commit: str) -> "Cache":
    """The reader that `load_dataset` ends with when offline, without its half minute of retries."""
    from datasets.packaged_modules.cache.cache import Cache

    short = name.split("/")[-1]
    return Cache(repo_id=name, dataset_name=short, config_name=config, version=version, hash=commit)
