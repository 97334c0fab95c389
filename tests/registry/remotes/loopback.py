"""A small HTTP server on this machine that notes what it is asked and answers as it is told."""

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Ask:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    def json(self):
        return json.loads(self.body)


@dataclass
class Reply:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None
    """What Content-Length says, if not the truth."""

    @classmethod
    def of(cls, document, status=200, **headers):
        return cls(status, json.dumps(document).encode(), headers)


class Server:
    """Answers while its block runs; `override` is asked first and may pass with None."""

    def __init__(self, host="127.0.0.1"):
        self.asked: list[Ask] = []
        self.override: Callable[[Ask], Reply | None] = lambda ask: None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.host = f"{host}:{self._server.server_port}"
        self.url = f"http://{self.host}"

    def __enter__(self):
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, ask: Ask) -> Reply:
        return Reply(404)

    def paths(self, method):
        return [ask.path for ask in self.asked if ask.method == method]


def _handler(server):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self):
            parts = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(parts.query).items()}
            headers = {key.lower(): value for key, value in self.headers.items()}
            body = self._body(headers)
            ask = Ask(self.command, unquote(parts.path), query, headers, body)
            server.asked.append(ask)
            self._send(server.override(ask) or server.answer(ask))

        do_GET = do_HEAD = do_POST = do_PUT = handle_any

        def _body(self, headers):
            if headers.get("transfer-encoding") != "chunked":
                return self.rfile.read(int(headers.get("content-length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _send(self, reply):
            self.send_response(reply.status)
            length = len(reply.body) if reply.length is None else reply.length
            for key, value in {"Content-Length": str(length), **reply.headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(reply.body)
            if length > len(reply.body):
                self.close_connection = True

        def log_message(self, *words):
            pass

    class Quiet(Handler):
        def handle(self):
            with suppress(OSError):  # the client went away, as some tests make it
                super().handle()

    return Quiet
