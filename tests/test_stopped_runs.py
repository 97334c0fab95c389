"""Runs that are told to stop, as a terminal, Slurm or Kubernetes does it: real processes."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from peftkit.cli.launch import SCRIPT
from peftkit.recipe import from_resolved
from peftkit.reporting.record import read_record
from peftkit.training.checkpoints import CheckpointFolder

pytestmark = pytest.mark.slow

FOLDER = Path("runs/tiny-seed0")
PEFTKIT = [sys.executable, "-m", "peftkit", "run", "tiny.yaml"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
ACCELERATE += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
ALONE = [*ACCELERATE, "--num_processes", "1", "--cpu", str(SCRIPT), "tiny.yaml"]
ANY_PORT = ["--main_process_port", "0"]
PAIR = [*ACCELERATE, "--multi_gpu", "--num_processes", "2", *ANY_PORT, str(SCRIPT), "tiny.yaml"]


@dataclass(frozen=True)
class Way:
    """How a run is started, who gets the signal, and what the command ends with."""

    command: list[str]
    number: signal.Signals
    to: str
    code: int
    launch: tuple[str, ...] = ()
    """What follows `--`."""


TERM, INT = signal.SIGTERM, signal.SIGINT
WAYS = {
    "peftkit, SIGTERM": Way(PEFTKIT, TERM, "process", 143),
    "peftkit, SIGTERM to every process": Way(PEFTKIT, TERM, "tree", 143),
    "peftkit, Ctrl-C": Way(PEFTKIT, INT, "group", 130),
    "peftkit on two, SIGTERM": Way([*PEFTKIT, "--nproc", "2"], TERM, "process", 143, (*ANY_PORT,)),
    "peftkit on two, SIGTERM to every process": Way(
        [*PEFTKIT, "--nproc", "2"], TERM, "tree", 143, (*ANY_PORT,)
    ),
    "peftkit on two, Ctrl-C": Way([*PEFTKIT, "--nproc", "2"], INT, "group", 130, (*ANY_PORT,)),
    "accelerate, SIGTERM": Way(ALONE, TERM, "process", -TERM),
    "accelerate, SIGTERM to the group": Way(ALONE, TERM, "group", -TERM),
    "accelerate, Ctrl-C": Way(ALONE, INT, "group", -INT),
    "accelerate on two, SIGTERM": Way(PAIR, TERM, "process", 1),
    "accelerate on two, SIGTERM to every process": Way(PAIR, TERM, "tree", 1),
    "accelerate on two, Ctrl-C": Way(PAIR, INT, "group", 1),
}
TAKEN_UP = ("peftkit, SIGTERM", "peftkit on two, SIGTERM", "accelerate, SIGTERM")
"""Of these the second launch is tried as well."""


@pytest.fixture
def begin(workplace, tiny_recipe, monkeypatch):
    """Start a way of running 240 steps; what is still going at the end is killed."""
    tiny_recipe["training"] |= {"num_train_epochs": 22, "logging_steps": 1, "save_steps": 60}
    tiny_recipe["training"] |= {"dataloader_num_workers": 1, "dropout": 0.1}
    Path("tiny.yaml").write_text(yaml.safe_dump(from_resolved(tiny_recipe).resolved()))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("HF_HOME", str(workplace / "hf"))
    begun = []

    def begin(way, *flags):
        after = ["--", *way.launch] if way.launch else []
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        begun.append(
            subprocess.Popen(
                [*way.command, *flags, *after],
                start_new_session=True,
                preexec_fn=lambda: signal.signal(INT, signal.default_int_handler),
                **pipes,
            )
        )
        return begun[-1]

    yield begin
    for process in begun:
        if process.poll() is None:
            for one in tree(process):
                one.kill()
        process.communicate()


def tree(process):
    whole = psutil.Process(process.pid)
    return [whole, *whole.children(recursive=True)]


def send(process, way):
    if way.to == "process":
        process.send_signal(way.number)
    elif way.to == "group":
        os.killpg(process.pid, way.number)
    else:  # as Slurm does it: everything that belongs to the job
        for one in tree(process):
            one.send_signal(way.number)


def await_true(condition, process=None):
    end = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.02)


def reached(step):
    log = FOLDER / "log.jsonl"
    return lambda: log.exists() and f'"step": {step},' in log.read_text()


@pytest.mark.parametrize("name", WAYS)
def test_a_stopped_run_saves_says_so_and_goes_on(begin, name):
    way = WAYS[name]
    process = begin(way)
    await_true(reached(5), process)
    family = tree(process)
    send(process, way)
    out, err = process.communicate(timeout=240)
    assert process.returncode == way.code, err
    await_true(lambda: (FOLDER / "record.json").exists())  # the launcher may end before the run
    psutil.wait_procs(family, timeout=60)
    assert [one for one in family if one.is_running()] == []
    record = read_record(FOLDER / "record.json")
    assert record.status == ("interrupted" if way.number == INT else "terminated")
    newest = CheckpointFolder(FOLDER / "checkpoints").newest()
    assert newest.state["step"] == record.optimizer_steps < 240
    assert out == ""
    said = f"stopped by {way.number.name}; --resume goes on after step {record.optimizer_steps}"
    if way.command[: len(PEFTKIT)] == PEFTKIT:
        assert [line for line in err.splitlines() if "stopped by" in line] == [said]
        assert err.splitlines()[-1] == said
    if name not in TAKEN_UP:
        return
    again = begin(way, "--resume")
    out, err = again.communicate(timeout=240)
    assert again.returncode == 0, err
    done = read_record(FOLDER / "record.json")
    assert (done.status, done.resumed_after_step) == ("completed", record.optimizer_steps)


def test_a_launcher_that_is_killed_early_takes_the_run_with_it(begin):
    process = begin(Way(PEFTKIT, signal.SIGKILL, "process", 1))
    await_true(lambda: len(tree(process)) > 2, process)  # peftkit, the launcher, the run
    _, launcher, run = tree(process)
    time.sleep(0.5)  # it imports its libraries
    launcher.kill()
    _, err = process.communicate(timeout=240)
    assert process.returncode == 1, err
    psutil.wait_procs([run], timeout=60)
    assert not run.is_running()
    assert not FOLDER.exists()


@pytest.mark.parametrize(("number", "code"), [(TERM, 143), (INT, 130)])
def test_a_run_that_is_stopped_before_it_has_begun_has_the_signals_code(begin, number, code):
    way = Way(PEFTKIT, number, "group", code)
    process = begin(way)
    await_true(lambda: len(tree(process)) > 1, process)  # the launcher
    time.sleep(0.5)
    send(process, way)
    _, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    assert not (FOLDER / "checkpoints").exists()


@pytest.mark.parametrize(("number", "code"), [(TERM, 143), (INT, 130)])
def test_a_comparison_has_the_code_of_its_signal_too(begin, number, code):
    tiny = yaml.safe_load(Path("tiny.yaml").read_text())
    for key in ("name", "output_dir", "seed"):
        del tiny[key]
    Path("tiny.yaml").write_text(yaml.safe_dump(tiny))
    words = ["compare", "tiny.yaml", "--seeds", "1"]
    process = begin(Way([sys.executable, "-m", "peftkit", *words], number, "group", code))
    folder = Path("comparison/runs/tiny-seed0")
    await_true(lambda: (folder / "log.jsonl").exists(), process)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    assert read_record(folder / "record.json").status in ("interrupted", "terminated")
