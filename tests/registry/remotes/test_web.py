"""Which hosts, how long, how many redirects: the limits of every request."""

import socket
import threading

import pytest
from loopback import Reply, Server
from remote_deltas import problem_of, refused_pull

from peftkit.errors import RegistryError
from peftkit.registry.remotes import pull, push, web
from peftkit.registry.remotes.address import parse_address
from peftkit.registry.remotes.guard import Guard
from peftkit.registry.remotes.oci import open_oci


def test_a_redirect_to_a_private_address_is_refused_before_it_is_asked(
    elsewhere, server, address, pushed, monkeypatch
):
    asked = []
    real = socket.create_connection
    monkeypatch.setattr(
        socket, "create_connection", lambda *a, **k: asked.append(a) or real(*a, **k)
    )
    away = Reply(307, headers={"Location": "https://169.254.169.254/latest/meta-data"})
    server.override = lambda ask: away if "blobs" in ask.path else None
    assert refused_pull(elsewhere, address) == (
        f"{address}: leads to 169.254.169.254 at the link-local address 169.254.169.254; refused, "
        "from there only loopback and public addresses are allowed"
    )
    assert asked == []


def test_a_name_that_changes_its_address_is_caught_when_connected(
    elsewhere, address, server, pushed, monkeypatch
):
    """The look-up says public; the connection then leads to this machine."""
    real = socket.getaddrinfo
    looked_up = []

    def rebinding(host, *words, **options):
        if host != "cdn.example":
            return real(host, *words, **options)
        looked_up.append(host)
        return real("93.184.216.34" if len(looked_up) == 1 else "127.0.0.1", *words, **options)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    monkeypatch.setattr("peftkit.registry.remotes.guard.is_loopback", lambda host: True)
    guard = Guard(address, "https://93.184.216.35")
    with web.guarded_session(guard) as session:
        port = server.host.partition(":")[2]
        problem = problem_of(session.get, f"http://cdn.example:{port}/secret")
    assert problem == (
        f"{address}: leads to cdn.example at the loopback address 127.0.0.1; refused, "
        "from there only public addresses are allowed"
    )
    assert server.paths("GET") == []


def test_this_machine_is_not_spoken_to_through_a_proxy(store, elsewhere, address, monkeypatch):
    with Server() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        push(store, "toy", address)
        assert str(pull(elsewhere, address)) == "toy@v1"
        assert proxy.asked == []


def test_redirects_end(elsewhere, server, address, pushed):
    server.override = lambda ask: Reply(307, headers={"Location": f"{ask.path}x"})
    assert refused_pull(elsewhere, address) == (
        f"{address}: redirects without end; check the address"
    )
    assert len(server.asked) == 6


@pytest.fixture
def silent():
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"oci://127.0.0.1:{listening.getsockname()[1]}/a:b"


def test_a_remote_that_never_answers_is_given_up(elsewhere, silent, monkeypatch):
    monkeypatch.setattr(web, "READ_SECONDS", 0.2)
    assert refused_pull(elsewhere, silent) == (
        f"{silent}: no answer in time; check the network, then try again"
    )


def test_a_body_that_drips_is_given_up(elsewhere, monkeypatch):
    monkeypatch.setattr(web, "READ_SECONDS", -1)
    with pytest.raises(RegistryError) as caught:
        web.at_most(iter([b"a"] * 5), 5, where="remote")
    assert caught.value.problems == ["remote: slower than 4096 bytes a second; try again"]


def test_a_slow_upload_may_take_longer_than_a_connection(store, monkeypatch):
    """Given as bytes, a body would have to be sent within the time that a connection gets."""
    monkeypatch.setattr(web, "CONNECT_SECONDS", 0.5)
    data, taken = b"x" * 4_000_000, []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        thread = threading.Thread(target=take_slowly, args=(listening, len(data), taken))
        thread.start()
        port = listening.getsockname()[1]
        with open_oci(parse_address(f"oci://127.0.0.1:{port}/a:b")) as remote:
            answer = remote._request(f"http://127.0.0.1:{port}/x", "PUT", data=data)
        thread.join()
    assert (answer.status_code, taken[0] >= len(data)) == (201, True)


def take_slowly(listening, size, taken):
    connection, _ = listening.accept()
    with connection:
        got, pause = 0, threading.Event()
        while got < size and (data := connection.recv(200_000)):
            got += len(data)
            pause.wait(0.05)
        taken.append(got)
        connection.sendall(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")


def test_another_machine_is_spoken_to_in_tls(store, monkeypatch):
    """Plain http would have been answered; a handshake is not."""
    said = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def listen():
            connection, _ = listening.accept()
            with connection:
                said.append(connection.recv(3))

        thread = threading.Thread(target=listen)
        thread.start()
        monkeypatch.setattr("peftkit.registry.remotes.address.is_loopback", lambda host: False)
        problem_of(push, store, "toy", f"oci://localhost:{listening.getsockname()[1]}/a:b")
        thread.join()
    assert said == [bytes([22, 3, 1])]  # a TLS record of a handshake
