"""What a registry sends is what its descriptor says, or refused; it is bounded before that."""

import json

import pytest
from loopback import Reply
from oci_server import digest_of
from remote_deltas import refused_pull

FILE = "adapter_model.safetensors"


def file_digest(registry):
    return f"sha256:{registry.find('toy').files[FILE].sha256}"


def test_a_changed_blob_is_refused_with_both_digests(store, elsewhere, server, address, pushed):
    digest = file_digest(store)
    good = server.blobs[digest]
    server.blobs[digest] = bad = bytes([good[0] ^ 1]) + good[1:]
    size = len(good)
    assert refused_pull(elsewhere, address) == (
        f"{address}: {FILE}: changed, expected {digest} ({size} bytes), "
        f"found {digest_of(bad)} ({size} bytes); push it again or pull another"
    )


def test_a_changed_manifest_is_refused_with_both_digests(elsewhere, server, pushed, address):
    pinned = pushed.pinned
    for key, data in server.manifests.items():
        server.manifests[key] = changed = data.replace(b"  ", b" ")
    assert refused_pull(elsewhere, pinned) == (
        f"{pinned}: manifest changed, expected {pushed.stored.digest}, "
        f"found {digest_of(changed)}; push it again or pull another"
    )
    header = {"Docker-Content-Digest": pushed.stored.digest}
    server.override = lambda ask: Reply(200, changed, header) if "manifests" in ask.path else None
    assert refused_pull(elsewhere, address) == (
        f"{address}: manifest changed, expected {pushed.stored.digest}, "
        f"found {digest_of(changed)}; push it again or pull another"
    )


@pytest.mark.parametrize("declared", ["the truth", "the whole"])
def test_a_body_that_ends_early_is_refused(store, elsewhere, server, address, pushed, declared):
    digest = file_digest(store)
    whole = server.blobs[digest]
    length = None if declared == "the truth" else len(whole)
    server.override = lambda ask: (
        Reply(200, whole[:-7], length=length) if ask.path.endswith(digest) else None
    )
    assert refused_pull(elsewhere, address) == (
        f"{address}: {FILE}: cut short, expected {len(whole)} bytes, "
        f"found {len(whole) - 7}; try again"
    )


def test_a_body_larger_than_its_descriptor_is_left_unread(
    store, elsewhere, server, address, pushed
):
    digest = file_digest(store)
    whole = server.blobs[digest]
    endless = Reply(200, whole + b"x" * 50_000_000)
    server.override = lambda ask: endless if ask.path.endswith(digest) else None
    assert refused_pull(elsewhere, address) == (
        f"{address}: {FILE}: more than {len(whole)} bytes; refused"
    )


def test_documents_are_bounded(elsewhere, server, address, pushed):
    big = Reply(200, b" " * (5 << 20))
    server.override = lambda ask: big if "manifests" in ask.path else None
    assert refused_pull(elsewhere, address) == f"{address}: more than 4194304 bytes; refused"


def manifest_with(server, change):
    """Serve the manifest after `change` of its document."""
    for key, data in server.manifests.items():
        document = json.loads(data)
        change(document)
        server.manifests[key] = json.dumps(document).encode()


def test_sizes_are_judged_before_anything_is_fetched(
    elsewhere, server, address, pushed, monkeypatch
):
    manifest_with(server, lambda document: document["config"].update(size=5 << 20))
    assert refused_pull(elsewhere, address) == (
        f"{address}: info of 5242880 bytes, at most 4194304 are allowed"
    )
    manifest_with(server, lambda document: document["config"].update(size=1))
    manifest_with(server, lambda document: document["layers"][0].update(size=1 << 60))
    said = refused_pull(elsewhere, address)
    assert said.startswith(f"{address}: 115292150460684")
    assert said.endswith("; free some space or point PEFTKIT_REGISTRY at another disk")
    assert [path for path in server.paths("GET") if "blobs" in path] == []


IMAGE = {"schemaVersion": 2, "config": {"digest": f"sha256:{'0' * 64}", "size": 1}, "layers": []}


@pytest.mark.parametrize(
    ("document", "found"),
    [
        (IMAGE, "none"),
        ({"schemaVersion": 2, "manifests": []}, "none"),
        ({**IMAGE, "artifactType": "application/x"}, "'application/x'"),
    ],
)
def test_what_is_no_delta_is_refused(elsewhere, server, address, document, found):
    server.manifests["team/toy:v1"] = json.dumps(document).encode()
    assert refused_pull(elsewhere, address) == (
        f"{address}: not a delta, expected artifactType application/vnd.peftkit.delta.v1+json, "
        f"found {found}"
    )


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{", b"\xff", b"[" * 100_000])
def test_a_manifest_that_is_no_manifest_is_one_line(elsewhere, server, address, body):
    server.manifests["team/toy:v1"] = body
    assert refused_pull(elsewhere, address).startswith(f"{address}: ")


def test_files_that_do_not_fit_the_kind_are_refused_before_they_are_fetched(
    elsewhere, server, address, pushed
):
    manifest_with(server, lambda document: document["layers"].pop())
    assert refused_pull(elsewhere, address) == (
        f"{address}: lists ['adapter_config.json'], a delta of kind 'adapter' has "
        "['adapter_config.json', 'adapter_model.safetensors']"
    )
    assert len([path for path in server.paths("GET") if "blobs" in path]) == 1
