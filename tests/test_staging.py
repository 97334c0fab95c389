"""Files that appear whole: on the disk before their name is."""

import os

from peftkit import staging


def test_a_file_is_on_disk_before_it_is_published(tmp_path, monkeypatch):
    events, fsync, replace = [], staging.fsync_path, os.replace

    def noted_fsync(path):
        events.append(("fsync", path.name, path.is_dir() or path.read_bytes()))
        fsync(path)

    def noted_replace(old, new):
        events.append(("replace", new.name))
        replace(old, new)

    monkeypatch.setattr(staging, "fsync_path", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    staging.write_file(tmp_path / "x", b"data")
    (first, temporary, content), second, third = events
    assert (first, content, second) == ("fsync", b"data", ("replace", "x"))
    assert temporary.startswith(".staging-")
    assert third == ("fsync", tmp_path.name, True)
