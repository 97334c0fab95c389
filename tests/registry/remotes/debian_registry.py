"""Debian's `docker-registry` on a free port of this machine, and a proxy that cuts connections."""

import contextlib
import shutil
import socket
import subprocess
import threading
import time
import urllib.request

import pytest

PROGRAMS = ("docker-registry", "skopeo")
MISSING = [name for name in PROGRAMS if shutil.which(name) is None]
needs_debian = pytest.mark.skipif(
    bool(MISSING),
    reason=f"not installed: {', '.join(MISSING)} (apt-get install {' '.join(PROGRAMS)})",
)


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class DebianRegistry:
    """Keeps its blobs below `folder`, also from one start to the next."""

    def __init__(self, folder):
        self.data, self.port = folder / "data", free_port()
        self.host = f"127.0.0.1:{self.port}"
        self.config = folder / "config.yml"
        self.config.write_text(
            "version: 0.1\nlog: {level: error}\n"
            f"storage: {{filesystem: {{rootdirectory: {self.data}}}}}\n"
            f'http: {{addr: "{self.host}"}}\n'
        )

    def start(self):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(["docker-registry", "serve", str(self.config)], **quiet)
        for _ in range(200):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://{self.host}/v2/", timeout=5).close()
                return self
            time.sleep(0.05)
        raise AssertionError("docker-registry did not start")

    def stop(self):
        self.process.kill()
        self.process.wait()

    def blob(self, digest):
        """The file in which the registry keeps a blob."""
        kind, _, sha256 = digest.partition(":")
        return self.data / f"docker/registry/v2/blobs/{kind}/{sha256[:2]}/{sha256}/data"


class CuttingProxy:
    """Passes bytes on to a port, until it has passed `allowed` in one direction."""

    def __init__(self, port, *, upwards, allowed):
        self._to, self._upwards, self.left = port, upwards, allowed
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self._threads = []

    def __enter__(self):
        self._start(self._accept)
        return self

    def __exit__(self, *error):
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for thread in self._threads:
            thread.join(10)

    def _start(self, target, *words):
        thread = threading.Thread(target=target, args=words)
        self._threads.append(thread)
        thread.start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                far = socket.create_connection(("127.0.0.1", self._to))
                self._start(self._pass, near, far, self._upwards)
                self._start(self._pass, far, near, not self._upwards)

    def _pass(self, source, target, counted):
        with contextlib.suppress(OSError), source, target:
            while data := source.recv(4096):
                if counted:
                    self.left -= len(data)
                    if self.left < 0:
                        source.shutdown(socket.SHUT_RDWR)
                        target.shutdown(socket.SHUT_RDWR)
                        return
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
