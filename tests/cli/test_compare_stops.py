"""`compare` in a process of its own, stopped, killed and started again; and once for real."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from fake_runs import behave, starts

from peftkit.reporting.record import read_record
from peftkit.run_folder import try_lock

TESTS = Path(__file__).parent.parent
COMPARE = """
import signal, sys
from peftkit.cli import compare, launch, main
signal.signal(signal.SIGINT, signal.default_int_handler)
compare.write_report = lambda plan: print("reported")
if sys.argv[1] == "fake":
    import fake_runs
    launch.launch_command = fake_runs.launch_command
sys.exit(main(["compare", *sys.argv[2:]]))
"""
"""The report is another's; a background job ignores Ctrl-C, and children inherit that."""


@pytest.fixture
def recipes(workplace, tiny_recipe, monkeypatch):
    """`a.yaml` and `b.yaml`, which log every step and save every tenth."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS.parent), str(TESTS)]))
    behave()
    del tiny_recipe["name"]
    tiny_recipe["training"] |= {"logging_steps": 1, "save_steps": 10}
    for name in ("a", "b"):
        Path(f"{name}.yaml").write_text(yaml.safe_dump(tiny_recipe))
    return workplace


@pytest.fixture
def begin():
    """Start a comparison; what is still going at the end is killed."""
    begun = []

    def begin(*words, how="fake"):
        command = [sys.executable, "-c", COMPARE, how, *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        begun.append(subprocess.Popen(command, start_new_session=True, **pipes))
        return begun[-1]

    yield begin
    for process in begun:
        process.kill()
        process.communicate()


def ended(process):
    """Exit code, stdout, lines of stderr without the seconds."""
    out, err = process.communicate(timeout=400)
    return process.returncode, out, [line.partition(" (")[0] for line in err.splitlines()]


def await_true(condition):
    end = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_free(folder):
    """Whether every launcher that the comparison there has left behind has ended."""
    descriptor = try_lock(folder)
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is not None


def log_of(name):
    return Path("comparison/runs") / name / "log.jsonl"


def status_of(name):
    return read_record(Path("comparison/runs") / name / "record.json").status


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "exit_code"),
    [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "terminated", 143)],
)
def test_a_signal_reaches_all_runs_at_work_and_starts_no_more(
    recipes, begin, number, status, exit_code
):
    behave(a_seed0="waits", b_seed0="waits")
    words = ["a.yaml", "b.yaml", "--seeds", "2", "--jobs", "2"]
    comparing = begin(*words)
    await_true(lambda: log_of("a-seed0").exists() and log_of("b-seed0").exists())
    os.killpg(comparing.pid, number)
    code, out, said = ended(comparing)
    assert (code, out) == (exit_code, "")
    assert said[-2:] == [
        f"stopped by {number.name}: 4 of 4 runs are left; go on with",
        "peftkit compare a.yaml b.yaml --seeds 2 --jobs 2",
    ]
    waiting = f"{number.name}: waiting for the 2 runs that are at work to save a checkpoint and end"
    assert waiting in said
    assert sum(" seed 0: stopped: stopped by SIG" in line for line in said) == 2
    assert sorted(starts()) == ["a-seed0", "b-seed0"]
    assert status_of("a-seed0") == status_of("b-seed0") == status
    behave()
    code, out, said = ended(begin(*words))
    assert (code, out) == (0, "reported\n")
    assert sorted(starts()[2:]) == ["a-seed0 resume", "a-seed1", "b-seed0 resume", "b-seed1"]


@pytest.mark.slow
def test_a_run_that_outlives_a_killed_comparison_is_not_started_twice(recipes, begin):
    behave(a_seed0="waits")
    comparing = begin("a.yaml", "--seeds", "2")
    await_true(lambda: log_of("a-seed0").exists())
    comparing.kill()
    comparing.wait()
    assert ended(begin("a.yaml", "--seeds", "2")) == (
        1,
        "",
        ["comparison/runs/a-seed0: a run is at work in this folder; wait until it has ended"],
    )
    Path("go").touch()
    await_true(lambda: is_free(Path("comparison")))
    code, _, said = ended(begin("a.yaml", "--seeds", "2"))
    assert (code, said[0]) == (0, "1 of 2 runs are done already")
    assert starts() == ["a-seed0", "a-seed1"]


def test_a_run_that_is_killed_is_a_row_by_its_signal(recipes, begin):
    behave(a_seed0="saved then killed")
    code, out, said = ended(begin("a.yaml", "--seeds", "2"))
    assert (code, out) == (1, "reported\n")
    assert "[1/2] a seed 0: failed: killed by signal 9" in said
    left = json.loads(Path("comparison/runs/a-seed0/launch.json").read_text())
    assert left["error"] == "killed by signal 9 (out of memory?)"
    assert status_of("a-seed1") == "completed"


@pytest.mark.slow
def test_a_real_comparison_that_is_killed_goes_on_and_repeats_nothing(recipes, begin):
    words = ["a.yaml", "b.yaml", "--seeds", "2", "training.num_train_epochs=10"]
    comparing = begin(*words, how="real")
    # Half-way: the second run is training when everything is killed.
    await_true(lambda: log_of("b-seed0").exists() and status_of("a-seed0") == "completed")
    saved = Path("comparison/runs/b-seed0/checkpoints")
    await_true(lambda: any(saved.glob("step-*")))
    children = psutil.Process(comparing.pid).children(recursive=True)
    for process in (comparing, *children):
        process.kill()
    comparing.wait()
    first = Path("comparison/runs/a-seed0/record.json").read_bytes()
    assert not Path("comparison/runs/b-seed0/record.json").exists()
    code, out, said = ended(begin(*words, how="real"))
    assert (code, out) == (0, "reported\n"), said
    assert said[0] == "1 of 4 runs are done already"
    assert said[1].startswith("[2/4] b seed 0: started again, after step ")
    assert Path("comparison/runs/a-seed0/record.json").read_bytes() == first
    names = ("a-seed0", "b-seed0", "a-seed1", "b-seed1")
    records = [read_record(Path("comparison/runs") / name / "record.json") for name in names]
    assert [record.status for record in records] == ["completed"] * 4
    assert [record.resumed_after_step is not None for record in records] == [
        False,
        True,
        False,
        False,
    ]
    assert [r.started for r in records] == sorted(r.started for r in records)
    code, out, said = ended(begin(*words, how="real"))
    assert (code, said) == (0, ["4 of 4 runs are done already"])


@pytest.mark.slow
def test_a_real_run_that_is_killed_says_by_what(recipes, begin):
    comparing = begin("a.yaml", "--seeds", "1", "training.num_train_epochs=50", how="real")
    await_true(lambda: log_of("a-seed0").exists())
    children = psutil.Process(comparing.pid).children(recursive=True)
    (run,) = [child for child in children if any("run.py" in word for word in child.cmdline()[1:3])]
    run.kill()
    code, _, said = ended(comparing)
    assert code == 1
    assert "[1/1] a seed 0: failed: killed by signal 9" in said
