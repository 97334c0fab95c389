"""A store with a delta, an empty one, and a registry between them."""

import pytest
from oci_server import OciServer
from remote_deltas import save

from peftkit.registry import Registry
from peftkit.registry.remotes import push


@pytest.fixture
def store(tmp_path):
    """Holds `toy@v1`, an adapter."""
    registry = Registry(tmp_path / "here")
    save(registry, "toy")
    return registry


@pytest.fixture
def elsewhere(tmp_path):
    return Registry(tmp_path / "elsewhere")


@pytest.fixture(autouse=True)
def no_login(tmp_path, monkeypatch):
    """Neither a login nor a proxy of whoever runs the tests."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server():
    with OciServer() as running:
        yield running


@pytest.fixture
def address(server):
    return f"oci://{server.host}/team/toy:v1"


@pytest.fixture
def pushed(store, server, address):
    """What the remote got; its log starts anew."""
    done = push(store, "toy", address)
    server.asked.clear()
    return done
