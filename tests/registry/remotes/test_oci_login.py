"""A login is used where it is asked for, and goes nowhere else."""

import base64
import json

import pytest
from loopback import Reply
from oci_server import OciServer, refusal
from remote_deltas import problem_of, refused_pull

from peftkit.registry.remotes import pull, push


def with_login(tmp_path, host, secret="me:secret"):
    folder = tmp_path / "home/.docker"
    folder.mkdir(parents=True)
    auth = base64.b64encode(secret.encode()).decode()
    (folder / "config.json").write_text(json.dumps({"auths": {host: {"auth": auth}}}))
    return f"Basic {auth}"


BASIC = {"WWW-Authenticate": 'Basic realm="registry"'}


def basic_wall(expected):
    return lambda ask: (
        None
        if ask.headers.get("authorization") == expected
        else refusal(401, "UNAUTHORIZED", **BASIC)
    )


def test_without_a_login_the_way_to_one_is_said(store, elsewhere, server, address):
    server.override = lambda ask: refusal(401, "UNAUTHORIZED", **BASIC)
    expected = (
        f"{address}: authentication needed (HTTP 401, UNAUTHORIZED: unauthorized); "
        f"log in with `docker login {server.host}` or `oras login {server.host}`"
    )
    assert refused_pull(elsewhere, address) == expected
    assert problem_of(push, store, "toy", address).startswith(
        f"{address}: authentication needed (HTTP 401, "
    )


def test_a_login_of_docker_is_used(store, elsewhere, server, address, tmp_path, capfd):
    server.override = basic_wall(with_login(tmp_path, server.host))
    push(store, "toy", address)
    assert str(pull(elsewhere, address)) == "toy@v1"
    assert capfd.readouterr() == ("", "")


def test_a_login_that_is_refused_is_said(elsewhere, server, address, tmp_path):
    with_login(tmp_path, server.host)
    server.override = basic_wall("Basic other")
    assert "authentication needed (HTTP 401" in refused_pull(elsewhere, address)
    server.override = lambda ask: refusal(403, "DENIED")
    assert refused_pull(elsewhere, address) == (
        f"{address}: access denied (HTTP 403, DENIED: denied); "
        f"log in as someone who may: `docker login {server.host}`"
    )


@pytest.mark.parametrize("text", ["{", "[]", '{"auths": 3}', '{"auths": {"HOST": 3}}'])
def test_a_login_that_cannot_be_read_is_one_line(elsewhere, server, address, tmp_path, text):
    with_login(tmp_path, server.host)
    (tmp_path / "home/.docker/config.json").write_text(text.replace("HOST", server.host))
    said = refused_pull(elsewhere, address)
    assert said.startswith(f"{address}: login of ~/.docker/config.json: ")


def token_wall(realm, given):
    """Asks for a token of `realm` that is good for this kind of request only."""

    def wall(ask):
        if ask.path == "/token":
            given.append(ask)
            return Reply.of({"token": ask.query["scope"]})
        scope = "pull" if ask.method in ("GET", "HEAD") else "push"
        if scope in ask.headers.get("authorization", ""):
            return None
        challenge = f'Bearer realm="{realm}/token",service="here",scope="pull,{scope}"'
        return refusal(401, "UNAUTHORIZED", **{"WWW-Authenticate": challenge})

    return wall


def test_tokens_are_fetched_as_far_as_they_are_asked_for(
    store, elsewhere, server, address, tmp_path
):
    login, given = with_login(tmp_path, server.host), []
    server.override = token_wall(server.url, given)
    push(store, "toy", address)
    assert [ask.query["scope"] for ask in given] == ["pull,pull", "pull,push"]
    assert {ask.headers["authorization"] for ask in given} == {login}
    assert str(pull(elsewhere, address)) == "toy@v1"


def test_a_token_server_at_a_private_address_gets_no_password(elsewhere, server, address, tmp_path):
    with_login(tmp_path, server.host)
    server.override = token_wall("https://10.0.0.1", [])
    assert refused_pull(elsewhere, address) == (
        f"{address}: leads to 10.0.0.1 at the private address 10.0.0.1; refused, "
        "from there only loopback and public addresses are allowed"
    )


@pytest.mark.parametrize(
    "answer", [Reply(200, b"{"), Reply(200, b"[]"), Reply(200, b"x" * (9 << 20))]
)
def test_a_token_server_that_talks_nonsense_is_one_line(elsewhere, server, address, answer, capfd):
    wall = token_wall(server.url, [])
    server.override = lambda ask: answer if ask.path == "/token" else wall(ask)
    assert refused_pull(elsewhere, address).startswith(f"{address}: ")
    assert capfd.readouterr() == ("", "")


def test_a_token_that_is_refused_is_said_once(elsewhere, server, address, caplog):
    wall = token_wall(server.url, [])
    server.override = lambda ask: Reply(403) if ask.path == "/token" else wall(ask)
    assert "authentication needed (HTTP 401" in refused_pull(elsewhere, address)
    assert caplog.records == []  # oras would log an error, which Python writes to stderr


def test_credentials_go_to_no_other_host(store, elsewhere, server, address, tmp_path):
    """Neither by a redirect of a blob nor by the place of an upload."""
    login = with_login(tmp_path, server.host)
    with OciServer("localhost") as other:
        other.blobs = server.blobs
        server.upload_location = other.url + "/v2/{repository}/blobs/uploads/there"
        server.override = basic_wall(login)
        push(store, "toy", address)

        def elsewhere_for_blobs(ask):
            if ask.method == "GET" and "blobs" in ask.path:
                return Reply(307, headers={"Location": other.url + ask.path})
            return basic_wall(login)(ask)

        server.override = elsewhere_for_blobs
        assert str(pull(elsewhere, address)) == "toy@v1"
        assert len(other.asked) == 6
        assert not [ask for ask in other.asked if "authorization" in ask.headers]


def test_another_host_cannot_ask_for_the_password(elsewhere, server, address, tmp_path, pushed):
    with_login(tmp_path, server.host)
    with OciServer("localhost") as other:
        given = []
        other.override = token_wall(other.url, given)
        server.override = lambda ask: (
            Reply(307, headers={"Location": other.url + ask.path}) if "blobs" in ask.path else None
        )
        assert "authentication needed (HTTP 401" in refused_pull(elsewhere, address)
        assert given == []


def test_a_netrc_does_not_take_the_place_of_a_login(elsewhere, server, address, tmp_path):
    (tmp_path / "home").mkdir()
    netrc = tmp_path / "home/.netrc"
    netrc.write_text("machine 127.0.0.1 login a password b\n")
    netrc.chmod(0o600)
    problem_of(pull, elsewhere, address)
    assert [ask.headers.get("authorization") for ask in server.asked] == [None]
