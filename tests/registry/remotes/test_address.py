"""What is an address of a remote, and what is said of anything else."""

import pytest

from peftkit.errors import RegistryError
from peftkit.registry.remotes.address import HubAddress, OciAddress, parse_address

DIGEST = f"sha256:{'a' * 64}"
OCI = "expected oci://host/repository:tag or oci://host/repository@sha256: and 64 hex digits"
HUB = "expected hf://org/name or hf://org/name@revision"


@pytest.mark.parametrize(
    ("text", "address", "name"),
    [
        ("oci://ghcr.io/me/reviews:v1", OciAddress("ghcr.io", "me/reviews", "v1"), "reviews"),
        ("oci://localhost/a:b", OciAddress("localhost", "a", "b"), "a"),
        ("oci://[::1]:5000/a/b/c:D_1.x", OciAddress("[::1]:5000", "a/b/c", "D_1.x"), "c"),
        (f"oci://a.b:1/c.d@{DIGEST}", OciAddress("a.b:1", "c.d", None, DIGEST), "c.d"),
        ("hf://me/My-Lora", HubAddress("me/My-Lora"), "My-Lora"),
        ("hf://me/lora@refs/pr/1", HubAddress("me/lora", "refs/pr/1"), "lora"),
    ],
)
def test_an_address_is_read_and_written_alike(text, address, name):
    assert (parse_address(text), str(address), address.name) == (address, text, name)


@pytest.mark.parametrize(
    "rest",
    [
        *("", "host", "host/", "/a:b", "host/a", "host/a:", "host/A:b", "host/a:b:c", "host/a:b@c"),
        *("host/../a:b", "host/a//b:c", "host/a/:b", "user:secret@host/a:b", "host:0/a:b"),
        *("host:65536/a:b", "ho st/a:b", "host/a:b\n", "host/a:b?c", "host/a@sha256:abc", "-a/b:c"),
        *("host/a:" + "b" * 129, "[::1/a:b", "hóst/a:b", "host:٣/a:b", "host/a%2fb:c"),
    ],
)
def test_what_is_no_address_of_a_registry_is_refused(rest):
    with pytest.raises(RegistryError) as caught:
        parse_address(f"oci://{rest}")
    text = f"oci://{rest}"
    shown = repr(text if len(text) <= 80 else f"{text[:80]}…")
    assert caught.value.problems == [f"remote {shown}: {OCI}"]


@pytest.mark.parametrize(
    "rest",
    [
        *(
            "",
            "name",
            "org/",
            "/name",
            "a/b/c",
            "a/b@",
            "a/b@-x",
            "a/b@x..y",
            "../b",
            "a/..",
            "a/.b",
        ),
        *("a/b--c", "a/b.git", "a/b.git@main", "a b/c", "a/b\n", "a/é", "a/b@x y", "a/b:c"),
    ],
)
def test_what_is_no_address_on_the_hub_is_refused(rest):
    with pytest.raises(RegistryError) as caught:
        parse_address(f"hf://{rest}")
    assert caught.value.problems == [f"remote {f'hf://{rest}'!r}: {HUB}"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "ghcr.io/me/a:b",
            f"no scheme; {OCI}, or {HUB.removeprefix('expected ')}",
        ),
        ("ocy://h/a:b", "unknown scheme 'ocy'; did you mean 'oci'? Choices: hf, oci"),
        ("https://h/a:b", "unknown scheme 'https'; Choices: hf, oci"),
    ],
)
def test_the_schemes_are_named(text, problem):
    with pytest.raises(RegistryError) as caught:
        parse_address(text)
    assert caught.value.problems == [f"remote '{text}': {problem}"]


@pytest.mark.parametrize(
    ("host", "scheme"),
    [
        *((host, "http") for host in ("localhost", "localhost:5000", "127.8.9.1:1", "[::1]:80")),
        *((host, "https") for host in ("ghcr.io", "localhost.evil.com", "127.0.0.1.evil.com")),
        *((host, "https") for host in ("10.0.0.1:5000", "0.0.0.0:5000", "169.254.169.254")),
    ],
)
def test_plain_http_is_for_this_machine_only(host, scheme):
    assert OciAddress(host, "a", "b").url == f"{scheme}://{host}"
