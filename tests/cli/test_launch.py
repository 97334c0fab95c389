"""Launching: arguments and environment for Accelerate, signals, exit codes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import peftkit
from peftkit.cli import launch, main
from peftkit.cli.launch import launch_arguments, launch_environment
from peftkit.errors import Interrupted, RunError, UsageError

ROOT = Path(peftkit.__file__).parent.parent
WARNED_ABOUT = {"--num_processes", "--num_machines", "--mixed_precision", "--dynamo_backend"}

WORKER = """
import pathlib, signal, sys, time
log = pathlib.Path(sys.argv[1])
got = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda n, _: got.append(signal.Signals(n).name))
log.with_suffix('.ready').touch()
end = time.time() + 60
while not got and time.time() < end: time.sleep(0.02)
time.sleep(0.5)
log.write_text(' '.join(got))
sys.exit(3)
"""
"""Notes every signal that it gets, and takes its time to end."""

LAUNCHERS = {
    "waits": "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode != 0)",
    "passes on": """
import signal, subprocess, sys
child = subprocess.Popen(sys.argv[1:], start_new_session=True)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda n, _: child.send_signal(n))
sys.exit(child.wait() != 0)
""",
}
"""Accelerate's launcher of one process only waits, that of several passes signals on."""

SUPERVISOR = """
import os, sys
from peftkit.cli.launch import supervise
sys.exit(supervise([sys.executable, '-c', *sys.argv[1:]], environment=os.environ))
"""

SCRIPT = """
import os, pathlib, signal, sys, time
from peftkit.cli.launch import run_and_leave_exit_code
from peftkit.errors import UsageError

def run(argv):
    names = ("RANK", "WORLD_SIZE", "ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION")
    line = " ".join(os.environ.get(name, "-") for name in names)
    sys.stdout.write(f"{line} {argv}\\n")
    sys.stdout.flush()
    # The first to fail has the others stopped: each must have spoken before.
    spoken = pathlib.Path(os.environ["PEFTKIT_EXIT_FILE"]).parent
    (spoken / ("rank-" + os.environ.get("RANK", "0"))).touch()
    while len(list(spoken.glob("rank-*"))) < int(os.environ.get("WORLD_SIZE", "1")):
        time.sleep(0.02)
    if argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if argv[1] == "usage":
        raise UsageError("a usage problem")
    return int(argv[1])

sys.exit(run_and_leave_exit_code(run))
"""


@pytest.fixture(autouse=True)
def no_config_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe and a stub in the place of `run.py`."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(launch, "SCRIPT", script)
    monkeypatch.setattr("peftkit.recipe.load_recipe", lambda path, overrides: None)
    return "toy.yaml"


def processes(out):
    """What the stub's processes wrote: the words of each line, sorted by rank."""
    return sorted(line.split(maxsplit=4) for line in out.splitlines() if line)


def values(arguments):
    return dict(zip(arguments, [*arguments[1:], ""], strict=True))


def test_nothing_is_left_for_accelerate_to_warn_about():
    given = values(launch_arguments(None, []))
    assert given.keys() >= WARNED_ABOUT
    assert given["--num_processes"] == "1"
    assert "--multi_gpu" not in given


def test_several_processes_are_asked_for_in_the_way_that_works():
    given = values(launch_arguments(3, ["--mixed_precision", "bf16"]))
    assert given["--main_process_port"] == "0"
    machines = ["--num_machines", "2", "--main_process_ip", "10.0.0.1"]
    assert "--main_process_port" not in launch_arguments(3, machines)  # all need the same one
    assert given["--num_processes"] == "3"
    assert "--multi_gpu" in given
    assert given["--mixed_precision"] == "bf16"


@pytest.mark.parametrize("extra", [["--config_file", "x.yaml"], ["--config_file=x.yaml"]])
def test_a_config_file_rules(extra):
    assert launch_arguments(None, extra) == ["--quiet", *extra]
    assert launch_arguments(2, extra) == ["--quiet", "--num_processes", "2", "--multi_gpu", *extra]


def test_the_users_own_config_file_rules(tmp_path):
    (tmp_path / "hf" / "accelerate").mkdir(parents=True)
    (tmp_path / "hf" / "accelerate" / "default_config.yaml").touch()
    assert launch_arguments(None, []) == ["--quiet"]


def test_processes_share_the_cores(monkeypatch):
    monkeypatch.setattr(launch, "_accelerators", lambda at_least: 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    assert launch_environment({}, nproc=None, extra=[]) == {"OMP_NUM_THREADS": "8"}
    two = {"OMP_NUM_THREADS": "4", "ACCELERATE_USE_CPU": "true"}
    assert launch_environment({}, nproc=2, extra=[]) == two
    assert launch_environment({"OMP_NUM_THREADS": "1"}, nproc=None, extra=[]) == {
        "OMP_NUM_THREADS": "1"
    }


def test_accelerators_are_used_where_there_are_enough(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    assert "ACCELERATE_USE_CPU" not in launch_environment({}, nproc=2, extra=[])
    with pytest.raises(UsageError) as refused:
        launch_environment({}, nproc=4, extra=[])
    assert str(refused.value) == "--nproc 4: this machine has 2 accelerators; at most that"


def default_signals():
    """A background job ignores Ctrl-C, one under nohup SIGHUP, and children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize(
    ("sent", "received"), [("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM"), ("SIGHUP", "SIGTERM")]
)
def test_a_signal_reaches_the_run_once_and_its_end_is_awaited(launcher, sent, received, tmp_path):
    log = tmp_path / "log"
    worker = [sys.executable, "-c", WORKER, str(log)]
    command = [sys.executable, "-c", SUPERVISOR, LAUNCHERS[launcher], *worker]
    running = subprocess.Popen(command, start_new_session=True, preexec_fn=default_signals)
    await_file(log.with_suffix(".ready"))
    # To the whole group, as a terminal does it.
    os.killpg(running.pid, getattr(signal, sent))
    assert running.wait(timeout=60) == 1
    assert log.read_text() == received


def await_file(path):
    end = time.monotonic() + 240
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


def test_a_signal_before_the_run_has_begun_stops_the_launcher(tmp_path):
    ready = tmp_path / "ready"
    launcher = f"import pathlib, time; pathlib.Path({str(ready)!r}).touch(); time.sleep(60)"
    command = [sys.executable, "-c", SUPERVISOR, launcher]
    running = subprocess.Popen(
        command, preexec_fn=default_signals, stderr=subprocess.PIPE, start_new_session=True
    )
    await_file(ready)
    running.send_signal(signal.SIGINT)
    assert running.communicate(timeout=60)[1] == b""


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with launch.noted_signals() as pending:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
        assert pending == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("left", "ended", "code"), [("2", 1, 2), ("1", 1, 1), ("0", 0, 0)])
def test_the_exit_code_is_the_runs_own(left, ended, code, tmp_path):
    exit_file = tmp_path / "code"
    exit_file.write_text(left)
    assert launch._own_exit_code(exit_file, ended) == code


@pytest.mark.parametrize(("ended", "code"), [(0, 0), (2, 2)])
def test_without_a_run_the_launchers_code_counts(ended, code, tmp_path):
    assert launch._own_exit_code(tmp_path / "none", ended) == code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_was_stopped_before_it_began_has_the_signals_code(number, tmp_path):
    with pytest.raises(Interrupted) as stopped:
        launch._own_exit_code(tmp_path / "none", 128 + number)
    assert stopped.value.exit_code == 128 + number
    assert str(stopped.value) == f"stopped by {number.name}"


def test_a_run_that_was_killed_is_an_error(tmp_path):
    with pytest.raises(RunError) as killed:
        launch._own_exit_code(tmp_path / "none", 1)
    assert str(killed.value) == (
        "the run ended without a result (launcher: 1); it was stopped before it began or "
        "killed from outside, most often for lack of memory; see the lines above"
    )


def test_one_process_gets_its_arguments_and_its_code_comes_back(recipe, capfd):
    assert main(["run", recipe, "usage", "--resume", "--", "--mixed_precision", "bf16"]) == 2
    out, err = capfd.readouterr()
    assert processes(out) == [["-", "-", "False", "bf16", f"['{recipe}', 'usage', '--resume']"]]
    assert err == "a usage problem\n"


def test_two_processes_on_a_cpu_know_of_each_other(recipe, capfd):
    assert main(["run", recipe, "usage", "--nproc", "2"]) == 2
    out, err = capfd.readouterr()
    given = f"['{recipe}', 'usage']"
    assert processes(out) == [["0", "2", "true", "no", given], ["1", "2", "true", "no", given]]
    assert err == "a usage problem\n"


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_run_that_was_killed_is_told_with_its_signal(processes, recipe, capfd):
    assert main(["run", recipe, "killed", "--nproc", processes]) == 1
    assert capfd.readouterr().err == (
        "the run ended without a result: SIGKILL killed it, most often for lack of memory; "
        "see the lines above\n"
    )


@pytest.mark.parametrize(
    ("ended", "number"), [(137, signal.SIGKILL), (-15, signal.SIGTERM), (1, None), (255, None)]
)
def test_the_signal_comes_out_of_the_launchers_code(ended, number):
    assert launch.killing_signal(ended) == number


def test_runs_side_by_side_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    assert launch_environment({}, jobs=3) == {"OMP_NUM_THREADS": "2"}
    assert launch_environment({}, jobs=9) == {"OMP_NUM_THREADS": "1"}


def test_overwrite_and_resume_contradict_each_other(recipe, capsys):
    assert main(["run", recipe, "--overwrite", "--resume"]) == 2
    said = capsys.readouterr().err
    assert said == "--overwrite and --resume: give one of them\n"


def test_a_bad_recipe_is_refused_before_anything_is_launched(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "supervise", lambda *_, **__: pytest.fail("launched"))
    assert main(["run", str(tmp_path / "none.yaml")]) == 2
    said = capsys.readouterr().err
    assert said == f"{tmp_path / 'none.yaml'}: cannot be read: No such file or directory\n"
