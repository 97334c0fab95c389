"""Running an action in a forked process that dies, or whose calls fail, at a chosen call.

With strace every call of the process can be chosen, SQLite's included; without it the functions of
`os` that Python code calls. A fork keeps the imports, so a point costs some hundredths of a second.
"""

import ctypes
import errno
import io
import os
import shutil
import signal
import socket
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FUNCTIONS = ("open", "fsync", "fchmod", "mkdir", "rename", "replace", "rmdir", "symlink", "unlink")
"""Of `os`, patched beside `io.open` where there is no strace."""
_PR_SET_PTRACER = 0x59616D61
_OUR_OWN = {"exit_group", "recvfrom", "sendto"}


@dataclass(frozen=True)
class Ended:
    """How a forked action ended: `reply` is what it returned, as text; None if it was killed."""

    reply: str | None
    log: str = ""


@cache
def can_trace() -> bool:
    """Whether strace is there and may attach to another process."""
    if shutil.which("strace") is None:
        return False
    try:
        return bool(run(int, "-e", "trace=none").reply)
    except PermissionError:
        return False


def run(action: Callable[[], object], *options: str) -> Ended:
    """Run `action` in a fork, under strace if it gets `options`."""
    return started(action, *options)()


def started(action: Callable[[], object], *options: str) -> Callable[[], Ended]:
    """Start `action` in a fork; what is returned waits for its end."""
    ours, theirs = socket.socketpair()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, since 3.12
        process = os.fork()
    if not process:
        ours.close()
        _serve(theirs, action)
    theirs.close()
    try:
        tracer = _traced(process, options) if options else None
    except BaseException:
        ours.close()  # and so the fork goes on
        os.waitpid(process, 0)
        raise
    ours.send(b"go")  # neither `sendto` nor `recvfrom` is ever chosen

    def ended() -> Ended:
        with ours:
            reply = b""
            with suppress(ConnectionResetError):  # it died before it read
                while more := ours.recv(1 << 16):
                    reply += more
        _, status = os.waitpid(process, 0)
        log = tracer.communicate()[1] if tracer else ""
        assert reply or os.WIFSIGNALED(status), f"ended with {status}: {log}"
        return Ended(reply.decode() if reply else None, log)

    return ended


def _serve(theirs: socket.socket, action: Callable[[], object]) -> None:
    try:
        # Where Yama lets only a parent attach: let anybody do it.
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(-1))
        theirs.recv(2)
        reply = str(action())
    except BaseException as error:
        reply = f"{type(error).__name__}: {error}"
    theirs.send(reply.encode() or b" ")
    os._exit(0)


def _traced(process: int, options: tuple[str, ...]) -> "subprocess.Popen[str]":
    command = ["strace", "-p", str(process), *options]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert tracer.stderr
    line = tracer.stderr.readline()
    if "attached" not in line:
        tracer.communicate()
        raise PermissionError(line)
    return tracer


def recorded(action: Callable[[], object], folder: Path) -> list[str]:
    """The calls of an action that is left alone, with the paths behind descriptors."""
    log = folder / "calls"
    run(action, "-y", "-s", "0", "-o", str(log))
    lines = log.read_text().splitlines()
    log.unlink()
    return [line for line in lines if not line.startswith(("+++", "---"))]


def kinds(calls: list[str]) -> list[str]:
    """The kinds of calls in a recorded log, in the order of their first one."""
    return [k for k in dict.fromkeys(line.partition("(")[0] for line in calls) if k not in _OUR_OWN]


def killing(kind: str, number: int) -> tuple[str, ...]:
    """Options that kill the process in place of its `number`-th call of a kind."""
    return "-e", f"trace={kind}", "-e", f"inject={kind}:signal=SIGKILL:when={number}"


def failing(kind: str, number: int, name: str) -> tuple[str, ...]:
    """Options that let the `number`-th call of a kind fail with the error `name`."""
    return "-e", f"trace={kind}", "-e", f"inject={kind}:error={name}:when={number}"


@contextmanager
def patched(number: int, fault: Callable[[], None]) -> Iterator[list[str]]:
    """Call `fault` in place of the `number`-th call of `FUNCTIONS`; yields the names so far."""
    made: list[str] = []
    real = {(os, name): getattr(os, name) for name in FUNCTIONS} | {(io, "open"): io.open}

    def stand_in(module: object, name: str) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            made.append(name)
            if len(made) == number:
                fault()
            return real[module, name](*arguments, **options)

        return call

    for module, name in real:
        setattr(module, name, stand_in(module, name))
    try:
        yield made
    finally:
        for (module, name), function in real.items():
            setattr(module, name, function)


def die() -> None:
    """As the kernel ends a process: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(name: str) -> Callable[[], None]:
    """A fault that fails with the error `name`."""

    def fault() -> None:
        number = getattr(errno, name)
        raise OSError(number, os.strerror(number))

    return fault


def dying(action: Callable[[], object], number: int) -> Ended:
    """Run `action` in a fork that dies in place of its `number`-th patched call."""

    def until_then() -> object:
        with patched(number, die):
            return action()

    return run(until_then)
