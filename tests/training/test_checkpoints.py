"""Checkpoints: whole or absent, and damage found before use."""

import contextlib
import math
import os
import resource
import shutil
import time
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from peftkit.errors import RunError
from peftkit.training.checkpoints import (
    Checkpoint,
    CheckpointFolder,
    restore_trained,
    trained_tensors,
)
from peftkit.training.config import TrainingConfig

FILES = ["trained.safetensors", "optimizer.pt", "rng.pt", "state.json", "manifest.json"]


def checkpoint(step, best=None, size=2):
    optimizer = {"state": {0: {"step": torch.tensor(float(step))}}, "param_groups": []}
    rng = [{"torch": torch.get_rng_state(), "python": (3, (1, 2), None)}]
    return Checkpoint(
        {"w": torch.full((size,), float(step))}, optimizer, rng, {"step": step, "best_step": best}
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for step in (1, 2):
        CheckpointFolder(folder).save(checkpoint(step))
    return folder


def test_what_was_saved_is_read_back(two):
    found, expected = CheckpointFolder(two).newest(), checkpoint(2)
    assert torch.equal(found.trained["w"], expected.trained["w"])
    assert found.optimizer == expected.optimizer
    assert torch.equal(found.rng[0]["torch"], expected.rng[0]["torch"])
    assert (found.rng[0]["python"], found.state) == ((3, (1, 2), None), expected.state)


@pytest.mark.parametrize("damage", ["deleted", "truncated", "zeroed", "one bit"])
@pytest.mark.parametrize("name", FILES)
def test_damaged_newest_gives_the_one_before_with_one_warning(two, tmp_path, name, damage):
    folder = shutil.copytree(two, tmp_path / "copy")
    path = folder / "step-00000002" / name
    content = bytearray(path.read_bytes())
    if damage == "deleted":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "zeroed":
        path.write_bytes(bytes(len(content)))
    else:
        content[-20 if name == "manifest.json" else len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.warns(UserWarning) as caught:  # noqa: PT030
        found = CheckpointFolder(folder).newest()
    assert found.state["step"] == 1
    (warning,) = caught
    start = "checkpoint step-00000002 is skipped: "
    if name != "manifest.json":
        assert str(warning.message) == f"{start}{name} differ from the manifest"
    else:
        assert str(warning.message).startswith(start)


def test_a_file_too_many_is_damage(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "copy")
    (folder / "step-00000002/extra").touch()
    with pytest.warns(UserWarning, match=r"^checkpoint step-00000002 is skipped: extra differ"):
        assert CheckpointFolder(folder).newest().state["step"] == 1


def test_no_whole_checkpoint_is_an_error(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "copy")
    for step in folder.iterdir():
        (step / "rng.pt").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RunError) as raised:
            CheckpointFolder(folder).newest()
    assert str(raised.value) == f"{folder}: no checkpoint is whole; start again with --overwrite"


def test_none_where_there_is_none(tmp_path):
    assert CheckpointFolder(tmp_path / "nothing").newest() is None


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_interrupted_save_leaves_nothing_that_looks_whole(two, tmp_path, monkeypatch, call):
    folder = shutil.copytree(two, tmp_path / "copy")

    def dying(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, call, dying)
    with pytest.raises(KeyboardInterrupt):
        CheckpointFolder(folder).save(checkpoint(3))
    assert names(folder) == ["step-00000001", "step-00000002"]


def test_two_are_kept_and_the_best_that_they_need(tmp_path):
    folder, model = CheckpointFolder(tmp_path), nn.Linear(1, 1)
    for step, best in ((1, 1), (2, 1), (3, 3), (4, 3)):
        if best == step:
            folder.save_best(step, trained_tensors(model))
        folder.save(checkpoint(step, best))
    assert names(tmp_path) == ["best-00000003", "step-00000003", "step-00000004"]


@pytest.mark.parametrize("keep", [1, 3])
def test_the_recipe_says_how_many_are_kept(tmp_path, keep):
    folder = CheckpointFolder(tmp_path, keep=keep)
    for step in range(1, 6):
        folder.save(checkpoint(step))
    assert names(tmp_path) == [f"step-{step:08d}" for step in range(6 - keep, 6)]


@pytest.mark.parametrize("limit", [0, -1])
def test_at_least_one_is_kept(limit):
    with pytest.raises(ValueError, match="save_total_limit"):
        TrainingConfig(learning_rate=1.0, save_total_limit=limit)


def test_the_older_kept_checkpoint_keeps_its_own_best(tmp_path):
    folder, model = CheckpointFolder(tmp_path), nn.Linear(1, 1)
    for step in (1, 2):
        folder.save_best(step, trained_tensors(model))
        folder.save(checkpoint(step, step))
    assert names(tmp_path) == ["best-00000001", "best-00000002", "step-00000001", "step-00000002"]


def test_the_best_comes_back_into_the_model(tmp_path):
    folder, model = CheckpointFolder(tmp_path), nn.Linear(2, 2)
    kept = model.weight.detach().clone()
    folder.save_best(5, trained_tensors(model))
    with torch.no_grad():
        model.weight.zero_()
    folder.load_best(5, model)
    assert torch.equal(model.weight, kept)


def test_a_checkpoint_whose_best_is_damaged_is_skipped_with_one_warning(tmp_path):
    folder, model = CheckpointFolder(tmp_path), nn.Linear(2, 2)
    for step, best in ((1, 1), (2, 2)):
        folder.save_best(best, trained_tensors(model))
        folder.save(checkpoint(step, best))
    (tmp_path / "best-00000002/trained.safetensors").unlink()
    with pytest.warns(UserWarning) as caught:  # noqa: PT030
        assert folder.newest().state["step"] == 1
    assert [str(warning.message) for warning in caught] == [
        "checkpoint step-00000002 is skipped: best-00000002, the best one so far: "
        "trained.safetensors differ from the manifest"
    ]
    assert folder.newest(with_best=False).state["step"] == 2


def test_no_clock_says_which_checkpoint_is_the_newest(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path)
    now = iter(range(2_000_000_000, 0, -1_000_000))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))  # falls at every look
    for step in (1, 2, 3, 10):
        folder.save(checkpoint(step))
        os.utime(tmp_path / f"step-{step:08d}", (next(now),) * 2)
    assert names(tmp_path) == ["step-00000003", "step-00000010"]
    assert folder.newest().state["step"] == 10


@pytest.fixture
def little_space():
    """No file may grow beyond 100 kB, as on a disk that fills up while one is written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("what", ["trained", "optimizer", "state", "best"])
def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(tmp_path, little_space, what):
    folder = CheckpointFolder(tmp_path)
    folder.save(checkpoint(1))
    made = checkpoint(2, size=100_000 if what == "trained" else 2)
    if what == "optimizer":
        made.optimizer["state"][0]["step"] = torch.zeros(100_000)
    if what == "state":
        made.state["history"] = ["x" * 400_000]
    with pytest.raises(RunError) as raised:
        folder.save_best(
            2, trained_tensors(nn.Linear(1000, 100))
        ) if what == "best" else folder.save(made)
    (said,) = raised.value.problems
    name = "best" if what == "best" else "step"
    assert said.startswith(f"{tmp_path}/{name}-00000002: the checkpoint cannot be written: ")
    assert "File too large" in said
    assert said.endswith("; once that is mended, --resume goes on from step-00000001")
    assert names(tmp_path) == ["step-00000001"]
    assert folder.newest().state["step"] == 1


# A training that begins with the weights of one before


def test_a_beginning_takes_the_place_of_all_that_was(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2):
        folder.save_best(step, trained_tensors(nn.Linear(1, 1)))
        folder.save(checkpoint(step, step))
    folder.save(checkpoint(0))
    assert names(tmp_path) == ["begin-00000001"]
    folder.save(checkpoint(0, size=5))  # begun once more: with another recipe, say
    assert names(tmp_path) == ["begin-00000002"]
    assert folder.newest().trained["w"].shape == (5,)
    folder.drop_after(0)
    assert names(tmp_path) == ["begin-00000002"]
    folder.save(checkpoint(1))
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("removed", range(5))
def test_a_beginning_that_is_killed_loses_no_weights(tmp_path, monkeypatch, removed):
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2):
        folder.save_best(step, trained_tensors(nn.Linear(1, 1)))
        folder.save(checkpoint(step, step))
    real, calls = shutil.rmtree, []

    def dying(path, *arguments, **settings):
        calls.append(path)
        if len(calls) > removed:
            raise KeyboardInterrupt
        real(path, *arguments, **settings)

    monkeypatch.setattr(shutil, "rmtree", dying)
    with contextlib.suppress(KeyboardInterrupt):
        folder.save(checkpoint(0))
    found = folder.newest(with_best=False)
    assert found.state["step"] == (2 if removed < 3 else 0)  # the fourth is out of sight at once


def test_a_beginning_that_cannot_be_written_loses_nothing(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path)
    folder.save(checkpoint(1))

    def dying(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", dying)
    with pytest.raises(KeyboardInterrupt):
        folder.save(checkpoint(0))
    assert names(tmp_path) == ["step-00000001"]


def test_a_damaged_best_is_refused(tmp_path):
    folder, model = CheckpointFolder(tmp_path), nn.Linear(2, 2)
    folder.save_best(5, trained_tensors(model))
    path = tmp_path / "best-00000005/trained.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(RunError) as raised:
        folder.load_best(5, model)
    assert str(raised.value) == (
        f"{path.parent}: the best checkpoint cannot be used: "
        "trained.safetensors differ from the manifest"
    )


def test_a_checkpoint_of_another_model_is_refused():
    with pytest.raises(RunError) as raised:
        restore_trained(nn.Linear(2, 2), {"other": torch.zeros(1)})
    assert str(raised.value) == (
        "the checkpoint is of another model or method: trained parameters differ"
    )


def test_what_lies_beyond_the_resumed_step_is_dropped(tmp_path):
    folder, model = CheckpointFolder(tmp_path), nn.Linear(1, 1)
    for step in (1, 2):
        folder.save_best(step, trained_tensors(model))
        folder.save(checkpoint(step, 1))
    folder.save_best(3, trained_tensors(model))
    (tmp_path / ".staging-00ff").mkdir()
    folder.drop_after(1)
    assert names(tmp_path) == ["best-00000001", "step-00000001"]


class Killed(BaseException):
    """Nothing catches it, and nothing can be cleaned up after it."""


@contextlib.contextmanager
def killed(monkeypatch, *, fatal):
    """Of the calls that change a folder the first `fatal` are made; yields those made."""
    made = []

    def call(real, *arguments, **settings):
        if len(made) >= fatal:
            raise Killed
        made.append(real)
        return real(*arguments, **settings)

    with monkeypatch.context() as patched, contextlib.suppress(Killed):
        for name in ("mkdir", "rename", "unlink", "rmdir"):
            patched.setattr(os, name, partial(call, getattr(os, name)))
        yield made


def saves(folder, after):
    """The saves of a short run, from the one after step `after`."""
    for step in range(after + 1, 4):
        if step != 2:
            folder.save_best(step, trained_tensors(nn.Linear(1, 1)))
        folder.save(checkpoint(step, step if step != 2 else 1))


def test_killed_at_any_change_and_resumed_leaves_what_an_uninterrupted_run_does(
    tmp_path, monkeypatch
):
    with killed(monkeypatch, fatal=math.inf) as made:
        saves(CheckpointFolder(tmp_path / "whole", keep=1), 0)
    expected = names(tmp_path / "whole")
    assert expected == ["best-00000003", "step-00000003"]
    assert len(made) > 30
    for fatal in range(len(made)):
        folder = CheckpointFolder(tmp_path / str(fatal), keep=1)
        with killed(monkeypatch, fatal=fatal):
            saves(folder, 0)
        found = folder.newest()
        step = found.state["step"] if found else 0
        folder.drop_after(step)
        saves(folder, step)
        assert names(folder.folder) == expected, fatal


def test_a_damaged_older_one_does_not_stand_in_the_way(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=3)
    for step in (1, 2):
        folder.save(checkpoint(step))
    (tmp_path / "step-00000001/state.json").unlink()
    folder.save(checkpoint(3))
    assert names(tmp_path) == [f"step-0000000{step}" for step in (1, 2, 3)]


def test_clear_leaves_nothing(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "copy")
    CheckpointFolder(folder).clear()
    assert not folder.exists()
