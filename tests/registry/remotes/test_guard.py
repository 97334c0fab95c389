"""A remote may send its client on, but not into the network that the client alone can reach."""

import socket

import pytest

from peftkit.errors import RegistryError
from peftkit.registry.remotes.guard import Guard, kind_of

NAMES = {
    "registry.example": "93.184.216.34",
    "cdn.example": "151.101.1.6",
    "inner.example": "10.0.0.7",
    "office.example": "192.168.3.4",
    "self.example": "127.0.0.1",
}


@pytest.fixture(autouse=True)
def names(monkeypatch):
    """A look-up of names without a network; addresses stand for themselves."""

    def looked_up(host, port, *words, **options):
        found = NAMES.get(host, host)
        if not found[0].isdigit() and ":" not in found:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (found, port))]

    monkeypatch.setattr(socket, "getaddrinfo", looked_up)


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        *((a, "public") for a in ("93.184.216.34", "2606:4700::1111")),
        *((a, "private") for a in ("10.1.2.3", "172.16.0.1", "192.168.0.1", "100.64.0.1")),
        *((a, "private") for a in ("fd00::1", "192.0.2.1")),
        *((a, "link-local") for a in ("169.254.169.254", "fe80::1%eth0", "::ffff:169.254.169.254")),
        *((a, "loopback") for a in ("127.0.0.1", "127.9.9.9", "::1", "0.0.0.0", "::")),
        ("::ffff:127.0.0.1", "loopback"),
    ],
)
def test_the_kind_of_an_address(address, kind):
    assert kind_of(address) == kind


@pytest.mark.parametrize(
    ("remote", "target"),
    [
        ("https://registry.example", "https://cdn.example/blob"),
        ("https://registry.example", "https://registry.example:444/other"),
        ("https://registry.example", "https://nowhere.example/blob"),
        ("https://inner.example", "https://office.example/blob"),
        ("https://inner.example", "https://cdn.example/blob"),
        ("http://127.0.0.1:5000", "http://localhost:9000/blob"),
        ("http://127.0.0.1:5000", "https://cdn.example/blob"),
    ],
)
def test_a_host_of_the_remotes_kind_or_a_public_one_is_allowed(remote, target, monkeypatch):
    monkeypatch.setitem(NAMES, "localhost", "127.0.0.1")
    Guard("remote", remote).check(target)


@pytest.mark.parametrize(
    ("remote", "target", "said"),
    [
        ("https://registry.example", "10.0.0.1", "10.0.0.1 at the private address 10.0.0.1"),
        (
            "https://registry.example",
            "inner.example",
            "inner.example at the private address 10.0.0.7",
        ),
        (
            "https://registry.example",
            "self.example",
            "self.example at the loopback address 127.0.0.1",
        ),
        (
            "https://registry.example",
            "169.254.169.254",
            "169.254.169.254 at the link-local address 169.254.169.254",
        ),
        ("https://inner.example", "127.0.0.1", "127.0.0.1 at the loopback address 127.0.0.1"),
        ("https://inner.example", "0.0.0.0", "0.0.0.0 at the loopback address 0.0.0.0"),
        ("http://127.0.0.1:5000", "10.0.0.1", "10.0.0.1 at the private address 10.0.0.1"),
        (
            "http://127.0.0.1:5000",
            "169.254.169.254",
            "169.254.169.254 at the link-local address 169.254.169.254",
        ),
    ],
)
def test_a_host_further_inside_is_refused(remote, target, said):
    guard = Guard("remote", remote)
    own = {"registry": "public", "inner": "private and public", "127": "loopback and public"}
    allowed = own[remote.split("//")[1].split(".")[0]]
    with pytest.raises(RegistryError) as caught:
        guard.check(f"https://{target}/latest/meta-data")
    assert caught.value.problems == [
        f"remote: leads to {said}; refused, from there only {allowed} addresses are allowed"
    ]


@pytest.mark.parametrize(
    "target", ["http://cdn.example/a?signature=x", "http://me:pw@cdn.example/a"]
)
def test_plain_http_to_another_machine_is_refused_without_its_secrets(target):
    with pytest.raises(RegistryError) as caught:
        Guard("remote", "http://127.0.0.1:5000").check(target)
    assert caught.value.problems == [
        "remote: http://cdn.example is not https; plain http is for this machine only"
    ]


@pytest.mark.parametrize("url", ["ftp://cdn.example/a", "file:///etc/passwd", "HTTP://x", "//x"])
def test_other_schemes_are_refused(url):
    with pytest.raises(RegistryError, match="plain http is for this machine only"):
        Guard("remote", "https://registry.example").check(url)


def test_behind_a_proxy_names_are_left_to_it_but_addresses_are_not():
    guard = Guard("remote", "https://registry.example")
    guard.check("https://inner.example/", resolve=False)
    with pytest.raises(RegistryError, match="the private address 10\\.0\\.0\\.1"):
        guard.check("https://10.0.0.1/", resolve=False)
