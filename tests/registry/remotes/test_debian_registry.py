"""Against a registry and a client that others wrote: docker-registry and skopeo."""

import json
import re
import subprocess

import pytest
from debian_registry import CuttingProxy, DebianRegistry, needs_debian
from remote_deltas import contents_of, nothing_in, problem_of, refused_pull, save

from peftkit.registry.remotes import pull, push

pytestmark = needs_debian

FILE = "adapter_model.safetensors"
HALF = 200_000
"""Bytes: more than all requests and documents, less than the tensors."""


@pytest.fixture
def registry(tmp_path):
    running = DebianRegistry(tmp_path).start()
    yield running
    running.stop()


@pytest.fixture
def address(registry):
    return f"oci://{registry.host}/team/toy:v1"


@pytest.fixture
def large(store):
    """`toy@v2`, large enough to be cut in the middle."""
    save(store, "toy", size=100_000)
    return store


def skopeo(*words):
    done = subprocess.run(["skopeo", *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_delta_travels_to_the_byte_under_one_digest(store, elsewhere, registry, address):
    pushed = push(store, "toy", address)
    stored = pull(elsewhere, address)
    assert contents_of(elsewhere, "toy") == contents_of(store, "toy")
    raw = skopeo("inspect", "--raw", "--tls-verify=false", f"docker://{registry.host}/team/toy:v1")
    assert raw.encode() == contents_of(store, "toy")[2]
    assert str(pull(elsewhere, pushed.pinned, save_as="pinned")) == "pinned@v1"
    assert stored.digest == pushed.stored.digest == pushed.pinned.partition("@")[2]


def test_tags_repositories_and_digests_that_are_not_there_are_said(elsewhere, registry):
    for rest in ("team/none:v1", f"team/none@sha256:{'0' * 64}"):
        unknown = f"oci://{registry.host}/{rest}"
        said = refused_pull(elsewhere, unknown)
        assert re.fullmatch(
            rf"{re.escape(unknown)}: no such tag or digest \(HTTP 404, MANIFEST_UNKNOWN: "
            r"manifest unknown\); check the address",
            said,
        )


def test_a_push_that_is_cut_leaves_no_tag_and_is_completed(large, elsewhere, registry, address):
    with CuttingProxy(registry.port, upwards=True, allowed=HALF) as proxy:
        through = f"oci://{proxy.host}/team/toy:v1"
        said = problem_of(push, large, "toy", through)
    assert said.startswith(f"{through}: the connection failed (")
    assert "no such tag" in refused_pull(elsewhere, address)
    push(large, "toy", address)
    pull(elsewhere, address)
    assert contents_of(elsewhere, "toy") == contents_of(large, "toy")


def test_a_pull_that_is_cut_stores_nothing_and_is_completed(large, elsewhere, registry, address):
    push(large, "toy", address)
    size = large.find("toy").files[FILE].size
    with CuttingProxy(registry.port, upwards=False, allowed=HALF) as proxy:
        through = f"oci://{proxy.host}/team/toy:v1"
        said = refused_pull(elsewhere, through)
    found = re.fullmatch(
        rf"{re.escape(through)}: {FILE}: cut short, expected {size} bytes, found (\d+); try again",
        said,
    )
    assert 0 < int(found[1]) < HALF
    pull(elsewhere, address)
    assert contents_of(elsewhere, "toy") == contents_of(large, "toy")


def test_a_registry_that_dies_is_said_and_one_that_comes_back_has_it_all(
    store, elsewhere, registry, address
):
    push(store, "toy", address)
    registry.stop()
    dead = f"{address}: cannot be reached (Connection refused); check the address and the network"
    assert refused_pull(elsewhere, address) == dead
    assert problem_of(push, store, "toy", address) == dead
    registry.start()
    pull(elsewhere, address)
    assert contents_of(elsewhere, "toy") == contents_of(store, "toy")


def test_a_blob_that_changed_on_its_disk_is_refused(store, elsewhere, registry, address):
    push(store, "toy", address)
    expected = store.find("toy").files[FILE]
    file = registry.blob(f"sha256:{expected.sha256}")
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    said = refused_pull(elsewhere, address)
    assert said.startswith(f"{address}: {FILE}: changed, expected {expected}, found sha256:")
    file.write_bytes(data)
    assert str(pull(elsewhere, address)) == "toy@v1"


def test_a_manifest_that_changed_on_its_disk_is_refused(store, elsewhere, registry, address):
    pushed = push(store, "toy", address)
    file = registry.blob(pushed.stored.digest)
    file.write_bytes(file.read_bytes().replace(b"  ", b" "))
    said = refused_pull(elsewhere, address)
    assert said.startswith(f"{address}: manifest changed, expected {pushed.stored.digest}, found ")


def test_skopeo_reads_the_store_and_copies_it_to_a_registry(store, elsewhere, registry):
    layout = f"oci:{store.root}:toy@v1"
    document = json.loads(skopeo("inspect", "--raw", layout))
    assert document["artifactType"] == "application/vnd.peftkit.delta.v1+json"
    skopeo("copy", "--dest-tls-verify=false", layout, f"docker://{registry.host}/copied/toy:v1")
    stored = pull(elsewhere, f"oci://{registry.host}/copied/toy:v1")
    assert stored.digest == store.find("toy").digest
    assert contents_of(elsewhere, "toy") == contents_of(store, "toy")


def test_an_image_that_is_no_delta_is_refused(elsewhere, registry, tmp_path):
    (tmp_path / "image").mkdir()
    (tmp_path / "image/manifest.json").write_text("[]")
    empty = tmp_path / "empty.tar"
    subprocess.run(["tar", "-cf", empty, "-T", "/dev/null"], check=True)
    address = f"oci://{registry.host}/other/image:v1"
    skopeo("copy", "--dest-tls-verify=false", f"tarball:{empty}", f"docker://{address[6:]}")
    assert refused_pull(elsewhere, address) == (
        f"{address}: not a delta, expected artifactType application/vnd.peftkit.delta.v1+json, "
        "found none"
    )
    assert nothing_in(elsewhere)
