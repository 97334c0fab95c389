"""`peftkit/run.py` as a script: its path, its arguments, its exit code."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import peftkit
from peftkit import run
from peftkit.cli.launch import EXIT_FILE

SCRIPT = Path(peftkit.__file__).with_name("run.py")


def script(*arguments, before="", **environment):
    """Run the script as `python peftkit/run.py` does, without peftkit on the path otherwise."""
    environment = {**os.environ, **environment}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, str(SCRIPT), *arguments]
    if before:
        setup = f"import runpy, sys; sys.argv = [{str(SCRIPT)!r}, *sys.argv[1:]]; {before}"
        command = [sys.executable, "-c", setup, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd="/", check=False
    )


def test_its_own_folder_gives_way_to_the_repository_root():
    before = (
        f"sys.path[0] = {str(SCRIPT.parent)!r}\n"
        f"try:\n runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print('\\n'.join(sys.path), file=sys.stderr)"
    )
    path = script("--help", before=before).stderr.splitlines()
    assert str(SCRIPT.parent.parent) in path
    assert str(SCRIPT.parent) not in path


def test_a_bad_recipe_exits_2_and_the_code_is_left_in_the_file(tmp_path):
    left = tmp_path / "code"
    done = script(str(tmp_path / "none.yaml"), **{EXIT_FILE: str(left)})
    assert done.returncode == 2
    assert done.stderr == f"{tmp_path / 'none.yaml'}: cannot be read: No such file or directory\n"
    assert left.read_text() == "2"


@pytest.mark.slow  # it waits for the launcher to stop it
def test_a_further_process_leaves_no_code(tmp_path):
    left = tmp_path / "code"
    script("none.yaml", **{EXIT_FILE: str(left), "LOCAL_RANK": "1", "RANK": "1"})
    assert not left.exists()


def test_arguments_come_in_any_order():
    found = run.parse(["a.yaml", "x=1", "--resume", "y=2", "--debug"])
    assert (found.recipe, found.overrides, found.on_exists) == (
        Path("a.yaml"),
        ["x=1", "y=2"],
        "resume",
    )
    assert found.debug


@pytest.mark.parametrize("word", ["overwrite", "resume", "resume-weights-only"])
def test_each_way_with_a_folder_that_exists_has_its_flag(word):
    assert run.parse(["a.yaml", f"--{word}"]).on_exists == word


@pytest.mark.parametrize("arguments", [[], ["a.yaml", "--overwrite", "--resume"], ["a", "--nope"]])
def test_wrong_arguments_are_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        run.parse(arguments)
    assert stop.value.code == 2
    capsys.readouterr()


@pytest.mark.parametrize(("status", "code"), [("completed", 0), ("non_finite", 1)])
@pytest.mark.parametrize(("rank", "said"), [("0", "the summary\n"), ("1", "")])
def test_the_main_process_says_the_result(status, code, rank, said, monkeypatch, capsys):
    asked = {}

    def run_experiment(recipe, *, on_exists):
        asked.update(recipe=recipe, on_exists=on_exists)
        return SimpleNamespace(status=status)

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("peftkit.experiment.run_experiment", run_experiment)
    monkeypatch.setattr("peftkit.recipe.load_recipe", lambda path, overrides: (path, overrides))
    monkeypatch.setattr("peftkit.reporting.summary.summary_lines", lambda record: ["the summary"])
    assert run.run(["a.yaml", "x=1"]) == code
    assert asked == {"recipe": (Path("a.yaml"), ["x=1"]), "on_exists": "refuse"}
    assert capsys.readouterr().out == said


def test_it_stays_short():
    assert len(SCRIPT.read_text().splitlines()) <= 40
