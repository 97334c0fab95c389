"""A base is hashed once, and never taken for what it was before it changed."""

import os

import pytest
import torch
from safetensors.torch import save_file

from peftkit.modeling import digest_cache, identity
from peftkit.modeling.identity import base_digest


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digest_cache, "SETTLED_NANOSECONDS", -1)
    folder = tmp_path / "base"
    folder.mkdir()
    save_file({"w": torch.arange(6.0)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def hashed(monkeypatch):
    """Names of the tensors that were read."""
    names = []
    real = identity._tensor_lines

    def lines(path):
        for name, line in real(path):
            names.append(name)
            yield name, line

    monkeypatch.setattr(identity, "_tensor_lines", lines)
    return names


def test_a_base_is_hashed_once(base, hashed):
    assert base_digest(base) == base_digest(base)
    assert hashed == ["w"]


def test_a_change_of_one_byte_is_seen_even_with_the_old_time(base, hashed):
    first = base_digest(base)
    path = base / "model.safetensors"
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert base_digest(base) != first
    assert hashed == ["w", "w"]


def test_a_file_that_was_just_written_is_not_remembered(base, hashed, monkeypatch):
    monkeypatch.setattr(digest_cache, "SETTLED_NANOSECONDS", 2_000_000_000)
    base_digest(base)
    base_digest(base)
    assert hashed == ["w", "w"]


def test_a_file_that_changes_while_it_is_read_is_not_remembered(base, tmp_path):
    path = base / "model.safetensors"

    def compute(found):
        path.write_bytes(path.read_bytes() + b" ")
        return {"w": "line"}

    digest_cache.cached_lines(path, compute)
    assert not (tmp_path / "cache").exists()


def test_the_hubs_own_digest_is_the_key_there(base, tmp_path, hashed):
    blobs, snapshots = tmp_path / "hub" / "blobs", [tmp_path / "hub" / s for s in ("a", "b")]
    blobs.mkdir(parents=True)
    blob = blobs / ("0f" * 32)
    (base / "model.safetensors").rename(blob)
    for snapshot in snapshots:
        snapshot.mkdir()
        (snapshot / "model.safetensors").symlink_to(blob)
    first = base_digest(snapshots[0])
    os.utime(blob)
    assert base_digest(snapshots[1]) == first
    assert hashed == ["w"]


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"w": 1}', b"[" * 100_000])
def test_a_damaged_entry_is_made_anew(base, hashed, tmp_path, content):
    first = base_digest(base)
    (entry,) = (tmp_path / "cache").rglob("*.json")
    entry.write_bytes(content)
    assert base_digest(base) == first
    assert hashed == ["w", "w"]


def test_a_cache_that_cannot_be_written_is_as_good_as_none(base, tmp_path, hashed):
    (tmp_path / "cache").write_text("a file")
    assert base_digest(base) == base_digest(base)
    assert hashed == ["w", "w"]
