"""The run's folder: refused, emptied, or taken up again; whole messages."""

import subprocess
import sys

import pytest

from peftkit import run_folder
from peftkit.recipe import from_resolved, resolved_yaml
from peftkit.training.config import TrainingConfig
from peftkit.training.start import start_accelerator


@pytest.fixture
def recipe(tiny_recipe):
    return from_resolved(tiny_recipe)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "tiny-seed0"


@pytest.fixture
def claimed(folder):
    accelerator = start_accelerator(TrainingConfig(learning_rate=1.0))

    def claimed(recipe, on_exists="refuse"):
        """What stands against it, or None."""
        try:
            with run_folder.claimed(folder, recipe, accelerator, on_exists=on_exists):
                return None
        except run_folder.SharedError as error:
            return str(error)

    return claimed


def changed(tiny_recipe, **training):
    return from_resolved({**tiny_recipe, "training": {**tiny_recipe["training"], **training}})


@pytest.mark.parametrize("on_exists", ["refuse", "overwrite", "resume"])
def test_a_new_folder_gets_the_recipe(claimed, folder, recipe, on_exists):
    assert claimed(recipe, on_exists) is None
    assert [path.name for path in folder.iterdir()] == ["recipe.yaml"]
    assert (folder / "recipe.yaml").read_text() == resolved_yaml(recipe)


def test_an_empty_folder_is_taken(claimed, folder, recipe):
    folder.mkdir(parents=True)
    assert claimed(recipe) is None


@pytest.mark.parametrize("on_exists", ["refuse", "overwrite", "resume"])
def test_a_folder_in_which_a_run_is_at_work_is_refused(claimed, folder, recipe, on_exists):
    claimed(recipe)
    # A process that is killed lets go of the lock, with nothing to tidy up.
    script = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), 2); print(); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", script, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    other.stdout.readline()
    message = f"{folder}: another run is at work in this folder; wait until it has ended"
    assert claimed(recipe, on_exists) == message
    other.kill()
    other.communicate()
    assert claimed(recipe, "resume") is None


def test_an_existing_run_is_refused_and_untouched(claimed, folder, recipe, tiny_recipe):
    claimed(recipe)
    message = f"{folder}: the run's folder exists; add --overwrite or --resume"
    assert claimed(changed(tiny_recipe, learning_rate=1.0)) == message
    assert (folder / "recipe.yaml").read_text() == resolved_yaml(recipe)


def test_overwrite_removes_what_a_run_wrote_and_nothing_else(claimed, folder, recipe, tiny_recipe):
    claimed(recipe)
    (folder / "checkpoints/step-00000001").mkdir(parents=True)
    for name in ("record.json", "launch.json", "predictions.parquet", "log.jsonl", "notes.txt"):
        (folder / name).write_text("mine")
    other = changed(tiny_recipe, learning_rate=1.0)
    assert claimed(other, "overwrite") is None
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", "recipe.yaml"]
    assert (folder / "recipe.yaml").read_text() == resolved_yaml(other)


def test_resume_takes_the_same_recipe_up_again(claimed, folder, recipe):
    claimed(recipe)
    (folder / "log.jsonl").write_text("kept")
    (folder / "launch.json").write_text("of a start that failed")
    assert claimed(recipe, "resume") is None
    assert not (folder / "launch.json").exists()
    assert (folder / "log.jsonl").read_text() == "kept"


def test_resume_of_a_changed_recipe_names_the_change(claimed, folder, recipe, tiny_recipe):
    claimed(recipe)
    assert claimed(changed(tiny_recipe, learning_rate=1.0), "resume") == (
        f"{folder}: --resume needs the recipe that the run was started with; "
        "training.learning_rate: then 0.005, now 1.0; --resume-weights-only begins anew with its "
        "weights"
    )


def test_weights_alone_are_taken_under_any_recipe(claimed, folder, recipe, tiny_recipe):
    claimed(recipe)
    (folder / "checkpoints/step-00000001").mkdir(parents=True)
    other = changed(tiny_recipe, learning_rate=1.0)
    assert claimed(other, "resume-weights-only") is None
    # Until the weights have been taken, it is a run of the recipe that it was.
    assert (folder / "recipe.yaml").read_text() == resolved_yaml(recipe)


@pytest.mark.parametrize("exists", [True, False])
def test_weights_alone_need_a_checkpoint(claimed, folder, recipe, exists):
    if exists:
        claimed(recipe)
    message = f"{folder}: --resume-weights-only finds no checkpoint there"
    assert claimed(recipe, "resume-weights-only") == message


def test_resume_without_a_recipe_is_refused(claimed, folder, recipe):
    folder.mkdir(parents=True)
    (folder / "notes.txt").touch()
    message = f"{folder}: has no recipe.yaml, so there is no run to resume; add --overwrite"
    assert claimed(recipe, "resume") == message


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b'{"status": "completed"}'])
def test_a_damaged_record_does_not_stop_a_resume(claimed, folder, recipe, content):
    claimed(recipe)
    (folder / "record.json").write_bytes(content)
    assert claimed(recipe, "resume") is None


def test_a_stored_recipe_that_is_no_text_is_another_recipe(claimed, folder, recipe):
    claimed(recipe)
    (folder / "recipe.yaml").write_bytes(b"\xff: [\n")
    assert claimed(recipe, "resume") == (
        f"{folder / 'recipe.yaml'}: is damaged, so the run cannot be resumed; add --overwrite"
    )


def test_a_list_in_another_order_is_named_with_its_key(claimed, folder, recipe, tiny_recipe):
    claimed(recipe)
    labels = [*reversed(tiny_recipe["task"]["labels"])]
    other = from_resolved({**tiny_recipe, "task": {**tiny_recipe["task"], "labels": labels}})
    assert claimed(other, "resume") == (
        f"{folder}: --resume needs the recipe that the run was started with; "
        'task.labels: then ["negative", "positive"], now ["positive", "negative"]; '
        "--resume-weights-only begins anew with its weights"
    )


def test_a_file_in_the_place_of_the_folder_is_named(claimed, folder, recipe):
    folder.parent.mkdir()
    folder.touch()
    assert claimed(recipe) == f"{folder}: cannot be written: File exists"
