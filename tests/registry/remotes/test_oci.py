"""Push to a registry and pull from it, and what is said when one of them cannot be done."""

import socket

import pytest
from loopback import Reply
from oci_server import refusal
from remote_deltas import contents_of, problem_of, refused_pull, save

from peftkit.registry.remotes import pull, push


def test_what_is_pulled_is_what_was_pushed_to_the_byte(store, elsewhere, address, pushed):
    stored = pull(elsewhere, address)
    assert (str(stored), stored.digest) == ("toy@v1", pushed.stored.digest)
    assert contents_of(elsewhere, "toy") == contents_of(store, "toy")
    assert pushed.pinned == f"{address.removesuffix(':v1')}@{stored.digest}"
    assert (pushed.remote, pull(elsewhere, pushed.pinned)) == (address, stored)


def test_a_weights_delta_travels_as_well(store, elsewhere, address):
    save(store, "heavy", kind="weights")
    push(store, "heavy", address)
    pull(elsewhere, address)
    assert contents_of(elsewhere, "toy") == contents_of(store, "heavy")


def test_the_manifest_goes_last_and_what_is_there_is_not_sent_again(store, server, address):
    push(store, "toy", address)
    assert [path.split("/")[4] for path in server.paths("PUT")] == ["blobs"] * 3 + ["manifests"]
    server.asked.clear()
    push(store, "toy", address)
    assert server.paths("PUT") == ["/v2/team/toy/manifests/v1"]
    assert server.paths("POST") == []


def test_pulling_twice_gives_one_version_and_another_tag_the_next(
    store, elsewhere, server, address
):
    push(store, "toy", address)
    assert str(pull(elsewhere, address)) == str(pull(elsewhere, address)) == "toy@v1"
    save(store, "toy", value=2.0)
    push(store, "toy", address)
    assert str(pull(elsewhere, address)) == "toy@v2"
    assert str(pull(elsewhere, address, save_as="other")) == "other@v1"


def test_a_remote_that_cannot_be_reached_is_said_at_once(store, elsewhere):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"oci://127.0.0.1:{taken.getsockname()[1]}/a:b"
        expected = f"{address}: cannot be reached (Connection refused); "
        expected += "check the address and the network"
        assert refused_pull(elsewhere, address) == expected
        assert problem_of(push, store, "toy", address) == expected


def test_an_unknown_tag_repository_and_version_are_told_apart(store, elsewhere, server, pushed):
    unknown = f"oci://{server.host}/team/toy:v2"
    assert refused_pull(elsewhere, unknown) == (
        f"{unknown}: no such tag or digest (HTTP 404, MANIFEST_UNKNOWN: manifest unknown); "
        "check the address"
    )
    server.override = lambda ask: refusal(404, "NAME_UNKNOWN")
    assert refused_pull(elsewhere, unknown) == (
        f"{unknown}: no such repository (HTTP 404, NAME_UNKNOWN: name unknown); check the address"
    )
    assert problem_of(push, store, "joy", unknown) == (
        f"{store.root}: no delta 'joy'; did you mean 'toy'? Choices: toy"
    )


def test_a_digest_is_not_pushed_to(store, server):
    address = f"oci://{server.host}/a@sha256:{'0' * 64}"
    assert problem_of(push, store, "toy", address) == (
        f"{address}: a digest follows from what is pushed; "
        f"name a tag, such as oci://{server.host}/a:v1"
    )
    assert server.asked == []


def test_a_bad_name_is_refused_before_anything_is_fetched(elsewhere, server):
    address = f"oci://{server.host}/team/latest:v1"
    assert problem_of(pull, elsewhere, address) == (
        "delta name 'latest': it would read as a version; take another, such as 'reviews-lora'; "
        "name it with --save-as"
    )
    assert server.asked == []


def test_a_damaged_version_is_not_sent(store, server, address):
    path = store.find("toy").path / "adapter_model.safetensors"
    path.resolve().chmod(0o644)
    path.resolve().write_bytes(b"damaged")
    assert "changed, expected sha256:" in problem_of(push, store, "toy", address)
    assert server.asked == []


def test_a_push_that_fails_half_way_leaves_no_tag_and_goes_on(store, elsewhere, server, address):
    calls = []

    def break_second(ask):
        calls.append(ask) if ask.method == "PUT" else None
        return Reply(503, b"") if len(calls) == 2 else None

    server.override = break_second
    assert problem_of(push, store, "toy", address) == (
        f"{address}: the registry refused PUT (HTTP 503, Service Unavailable); try again later"
    )
    assert server.manifests == {}
    sent = set(server.blobs)
    server.override = lambda ask: None
    server.asked.clear()
    push(store, "toy", address)
    assert not sent & {ask.query.get("digest") for ask in server.asked if ask.method == "PUT"}
    assert str(pull(elsewhere, address)) == "toy@v1"


def test_an_answer_that_is_no_success_is_none(store, server, address):
    server.override = lambda ask: Reply(304) if ask.method == "PUT" else None
    assert problem_of(push, store, "toy", address) == (
        f"{address}: the registry refused PUT (HTTP 304, Not Modified); try again later"
    )


def test_a_registry_that_keeps_other_bytes_is_found_out(store, server, address):
    other = f"sha256:{'1' * 64}"
    server.override = lambda ask: (
        Reply(201, headers={"Docker-Content-Digest": other})
        if ask.method == "PUT" and "manifests" in ask.path
        else None
    )
    assert problem_of(push, store, "toy", address) == (
        f"{address}: the registry changed the manifest, "
        f"expected {store.find('toy').digest}, found {other}"
    )


@pytest.mark.parametrize("place", ["", "http://[", "https://127.0.0.1:99999/x"])
def test_an_upload_that_leads_nowhere_is_one_line(store, server, address, place):
    headers = {"Location": place} if place else {}
    server.override = lambda ask: Reply(202, headers=headers) if ask.method == "POST" else None
    problem = problem_of(push, store, "toy", address)
    assert problem.startswith(f"{address}: ")
    assert problem.isprintable()


def test_a_library_that_ends_the_process_is_contained(elsewhere, server, address, monkeypatch):
    import oras.auth.base

    def leave(*words, **options):
        raise SystemExit(3)

    monkeypatch.setattr(oras.auth.base.AuthBackend, "load_configs", leave)
    assert refused_pull(elsewhere, address) == (
        f"{address}: login of ~/.docker/config.json: answers what cannot be understood (3)"
    )
