"""A disk that refuses loses nothing: the old versions load, one line says what happened, exit 1.

In the process every call that Python code makes fails in turn, with each error. Under strace every
call of the kinds in `KINDS` fails in turn, SQLite's included, the errors taking turns.
"""

import io
import itertools
import json
import os
import resource
import shutil
import subprocess
from contextlib import nullcontext, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import faults
import pytest
import torch
from small_store import adapter, indexed, info, state_of, weights

from peftkit.cli import main
from peftkit.cli.failures import exit_code_of
from peftkit.contracts import Delta
from peftkit.errors import RegistryError
from peftkit.registry import Registry
from peftkit.registry import store as store_module
from peftkit.registry.archive import export_archive
from peftkit.registry.tags import Tags

pytestmark = pytest.mark.slow

ERRORS = ("ENOSPC", "EIO", "EDQUOT")
KINDS = [
    *("openat", "read", "pread64", "getdents64", "readlink", "write", "pwrite64", "ftruncate"),
    *("fsync", "fdatasync", "fchmod", "mkdir", "rename", "symlink", "unlink", "unlinkat", "rmdir"),
]
HINTS = ("free some space", "check the disk", "remove the folder", "verify it", "restore")
NOT_DONE = ("not saved", "not set", "not removed")


def save(root: Path) -> int:
    return exit_code_of(
        lambda: Registry(root).save("reviews", adapter(3), info("adapter")) and 0, debug=False
    )


def command(*words: str):
    return lambda root: main(["adapters", *(w.format(root=root) for w in words)])


VERBS = {
    "save": save,
    "import": command("import", "{root}/../reviews.tar", "--save-as", "reviews"),
    "import-first": command("import", "{root}/../reviews.tar", "--save-as", "fresh"),
    "tag": command("tag", "reviews@v1", "good"),
    "tag-move": command("tag", "reviews@v1", "best", "--force"),
    "tag-delete": command("tag", "reviews", "best", "--delete"),
    "rm": command("rm", "reviews@v2"),
    "gc": command("gc"),
}


@pytest.fixture(scope="module")
def filled(fast_factory):
    folder = fast_factory()
    other = Registry(folder / "other")
    other.save("reviews", adapter(4), info("adapter"))
    export_archive(other, ["reviews"], folder / "reviews.tar")
    registry = Registry(folder / "store")
    registry.save("reviews", adapter(1), info("adapter"))
    registry.save("reviews", adapter(2), info("adapter"))
    registry.save("gone", weights(9), info())
    registry.rm("gone")
    registry.tag("reviews@v2", "best")
    return folder


@pytest.fixture
def place(filled, fast_factory, monkeypatch):
    """Makes a fresh copy of the store and the archive."""
    folder = fast_factory() / "place"
    monkeypatch.setenv("PEFTKIT_REGISTRY", str(folder / "store"))

    def copy() -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(filled, folder, symlinks=True)
        return folder / "store"

    return copy


def said(verb: str, root: Path) -> tuple[int, str]:
    """Exit code and stderr of a verb."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = VERBS[verb](root)
    return code, err.getvalue()


def problems(verb: str, root: Path, code: int, err: str, states: list[dict]) -> list[str]:
    """What is wrong with how a verb ended on a disk that refused once."""
    try:
        found, state, lines = [], state_of(root), err.splitlines()
    except (AssertionError, RegistryError) as error:
        return [f"a store that cannot be read: {error}"]
    if state not in states:
        found.append(f"state between: {state}")
    if code == 0 and state != states[1]:
        found.append("exit 0 but not done")
    if code != 0 and len(lines) != 1:
        found.append(f"{len(lines)} lines")
    if code != 0 and not any(hint in err for hint in HINTS):
        found.append(f"no hint: {err}")
    if "unexpected" in err or "Traceback" in err:
        found.append(f"surprise: {err}")
    if states[0] != states[1] and state == states[1] and any(word in err for word in NOT_DONE):
        found.append(f"done, but says it is not: {err}")
    again = said(verb, root)  # the disk is well again
    if again[0] and state == states[0]:
        found.append(f"fails afterwards: {again[1]}")
    return found


def states_of(verb: str, place) -> list[dict]:
    old = state_of(place())
    root = place()
    assert said(verb, root)[0] == 0
    return [old, state_of(root)]


def patched_points(verb, place):
    for name in ERRORS:
        for number in itertools.count(1):
            root = place()
            with faults.patched(number, faults.refuse(name)) as made:
                code, err = said(verb, root)
            if len(made) < number:
                break
            yield f"{name} at {number} ({made[number - 1]})", root, code, err


def traced_points(verb, place):
    root = place()

    def reply() -> str:
        return json.dumps(said(verb, root))

    called = faults.kinds(faults.recorded(reply, root.parent))
    for kind in (kind for kind in KINDS if kind in called):
        for number in itertools.count(1):
            name = ERRORS[number % len(ERRORS)]
            place()
            ended = faults.run(reply, *faults.failing(kind, number, name))
            if "(INJECTED)" not in ended.log:
                break
            yield f"{name} at {kind} {number}", root, *json.loads(ended.reply or "")


def sweep(verb, place, points) -> tuple[int, list[str]]:
    states, bad, count = states_of(verb, place), [], 0
    for where, root, code, err in points(verb, place):
        count += 1
        bad += [f"{where}: {line}" for line in problems(verb, root, code, err, states)]
    return count, bad


@pytest.mark.parametrize("verb", VERBS)
def test_a_refusal_of_any_call_loses_nothing(verb, place):
    count, bad = sweep(verb, place, patched_points)
    assert count > 20
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("verb", VERBS)
def test_a_refusal_of_any_system_call_loses_nothing(verb, place):
    if not faults.can_trace():
        pytest.skip("strace is not there, or may not attach")
    count, bad = sweep(verb, place, traced_points)
    assert count > 40
    assert not bad, "\n".join(bad)


def swallow(monkeypatch):
    real = Tags.set

    def set_(self, version, tag):
        with suppress(OSError):
            real(self, version, tag)

    monkeypatch.setattr(Tags, "set", set_)


def without_refusal(monkeypatch):
    monkeypatch.setattr(store_module, "disk_refusal", lambda *words, **more: nullcontext())


def without_looking_again(monkeypatch):
    real = store_module.disk_refusal
    monkeypatch.setattr(store_module, "disk_refusal", lambda root, what, **more: real(root, what))


@pytest.mark.parametrize(
    ("verb", "plant", "found"),
    [
        ("tag", swallow, "exit 0 but not done"),
        ("save", without_refusal, "surprise: OSError"),
        ("rm", without_looking_again, "done, but says it is not"),
    ],
)
def test_the_sweep_finds_a_planted_fault(verb, plant, found, place, monkeypatch):
    plant(monkeypatch)
    assert found in " ".join(sweep(verb, place, patched_points)[1])


def large(value: float, count: int) -> Delta:
    """A delta of 4 `count` bytes that do not compress."""
    return Delta("weights", {"w": torch.rand(count, generator=torch.manual_seed(0)) + value})


@pytest.fixture
def small_disk(tmp_path):
    """A disk of one MiB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is left to root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_full_keeps_what_it_has_and_can_be_freed(small_disk):
    registry = Registry(small_disk / "store")
    values = itertools.count(1)
    with pytest.raises(RegistryError) as caught:  # noqa: PT012
        while True:
            registry.save("reviews", large(next(values), 20_000), info())
    saved = next(values) - 2
    (line,) = caught.value.problems
    assert "(No space left on device); free some space or point PEFTKIT_REGISTRY" in line
    assert saved > 5
    stored = len([v for v in state_of(registry.root) if v.startswith("reviews@v")])
    assert stored == saved + ("stored and whole" in line)
    for number in range(1, stored):
        with suppress(RegistryError):  # `index.json` may stay behind on a full disk
            registry.rm(f"reviews@v{number}")
    registry.gc()
    registry.save("reviews", large(7, 20_000), info())
    assert len(state_of(registry.root)) == 2
    assert set(indexed(registry)) == state_of(registry.root).keys()


@pytest.mark.parametrize("verb", ["save", "import"])
def test_a_limit_on_the_size_of_files_is_told(verb, place, tmp_path):
    root = place()
    other = Registry(tmp_path / "other")
    other.save("reviews", large(1, 20_000), info())
    export_archive(other, ["reviews"], tmp_path / "large.tar")
    source = {"save": lambda: Registry(root).save("reviews", large(1, 20_000), info())}
    source["import"] = lambda: main(["adapters", "import", str(tmp_path / "large.tar")])

    def limited() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        err = io.StringIO()
        with redirect_stdout(io.StringIO()), redirect_stderr(err):
            code = exit_code_of(source[verb], debug=False)
        return json.dumps([code, err.getvalue()])

    before = state_of(root)
    code, err = json.loads(faults.run(limited).reply or "")
    assert (code, err) == (
        1,
        f"{root}: 'reviews' not saved, nothing was stored (File too large); free some space or "
        "point PEFTKIT_REGISTRY at another disk\n",
    )
    assert state_of(root) == before
    assert Registry(root).gc(dry_run=True).leftovers == []
