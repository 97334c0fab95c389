"""`compare` in this process, with runs that end at once: order, failures, going on, refusals."""

import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path
from types import SimpleNamespace

import fake_runs
import pytest
import yaml
from fake_runs import behave, starts

from peftkit.cli import compare, comparison_runs, launch, main
from peftkit.cli.comparison_folders import is_at_work, locked
from peftkit.cli.comparison_plan import read_plan
from peftkit.reporting.record import read_record

SEEDS_OF_TWO = [f"{name}-seed{seed}" for seed in (0, 1) for name in ("full", "lora")]
METHODS = {
    "full": {"type": "full"},
    "lora": {"type": "lora", "r": 2, "lora_alpha": 4, "target_modules": "all-linear"},
}


class Ended:
    """A process whose run is over; it says so after being asked twice."""

    alive = 0
    most_alive = 0

    def __init__(self, code):
        self.returncode, self._asked = code, 0
        Ended.alive += 1
        Ended.most_alive = max(Ended.alive, Ended.most_alive)

    def poll(self):
        self._asked += 1
        Ended.alive -= self._asked == 3
        return self.returncode if self._asked > 2 else None


@pytest.fixture
def environments(monkeypatch):
    """The environment of each start."""
    seen = []

    def start(command, *, environment, output, keep_open):
        seen.append(environment)
        arguments = command[command.index(str(launch.SCRIPT)) + 1 :]
        with open(os.dup(output), "w") as stream, redirect_stderr(stream):
            return Ended(fake_runs.carry_out(arguments))

    monkeypatch.setattr(launch, "start", start)
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(Ended, "alive", 0)
    monkeypatch.setattr(Ended, "most_alive", 0)
    return seen


@pytest.fixture
def reports(monkeypatch):
    """The plan of each report that is asked for."""
    asked = []
    monkeypatch.setattr(compare, "write_report", asked.append)
    return asked


@pytest.fixture
def recipes(workplace, tiny_recipe):
    """Two recipes in the current folder, which all complete."""
    behave()
    del tiny_recipe["name"]
    for name, method in METHODS.items():
        text = yaml.safe_dump({**tiny_recipe, "method": method})
        (workplace / f"{name}.yaml").write_text(text)
    return workplace


@pytest.fixture
def compared(recipes, environments, reports, capfd):
    """Compare both recipes; returns the exit code and the lines on stderr."""

    def compared(*words, seeds="1", files=("full.yaml", "lora.yaml")):
        code = main(["compare", *files, "--seeds", seeds, *words])
        return code, capfd.readouterr().err.splitlines()

    return compared


def folder(name):
    return Path("comparison/runs") / name


def launch_file(name):
    return json.loads((folder(name) / "launch.json").read_text())


def without_times(lines):
    """The lines up to what the clock says."""
    return [line.partition(" (")[0] for line in lines]


def test_the_first_seed_of_all_recipes_comes_first(compared, reports):
    code, said = compared("training.max_steps=3", seeds="2")
    assert code == 0
    assert starts() == SEEDS_OF_TWO
    assert without_times(said)[:4] == [
        "[1/4] full seed 0: started",
        "[1/4] full seed 0: done: accuracy 0.8750",
        "[2/4] lora seed 0: started",
        "[2/4] lora seed 0: done: accuracy 0.8750",
    ]
    assert said[-1].endswith("; nothing left")
    record = read_record(folder("lora-seed1") / "record.json")
    assert record.recipe["training"]["max_steps"] == 3
    assert record.recipe["output_dir"] == "comparison/runs"
    assert [plan.out for plan in reports] == ["comparison"]


def test_what_is_done_is_not_repeated(compared, reports):
    assert compared()[0] == 0
    assert compared() == (0, ["2 of 2 runs are done already"])
    assert len(reports) == 2
    code, said = compared(seeds="2")
    assert (code, said[0]) == (0, "2 of 4 runs are done already")
    assert said[1] == "[3/4] full seed 1: started"
    assert starts() == SEEDS_OF_TWO


def test_a_failure_is_a_row_and_stops_no_other(compared, reports):
    behave(
        full_seed0="out_of_memory", lora_seed0="killed", full_seed1="silent", lora_seed1="failed"
    )
    code, said = compared(seeds="3")
    assert code == 1
    assert len(starts()) == 6
    assert [line for line in without_times(said) if "failed" in line] == [
        "[1/6] full seed 0: failed: out of memory; halve it",
        "[2/6] lora seed 0: failed: killed by signal 9",
        "[3/6] full seed 1: failed: no registry today",
        "[4/6] lora seed 1: failed: the head fell off",
        "4 of 6 runs failed",
    ]
    assert launch_file("lora-seed0") == {
        "recipe": "lora",
        "seed": 0,
        "status": "failed",
        "error": "killed by signal 9 (out of memory?)",
    }
    assert launch_file("full-seed1")["error"] == "no registry today"
    assert Path("comparison/runs/full-seed1.out").read_text() == "a warning\nno registry today\n\n"
    assert not (folder("full-seed0") / "launch.json").exists()
    assert len(reports) == 1


def test_failures_are_repeated_only_when_asked(compared):
    failures = ("out_of_memory", "killed", "non_finite", "failed", "silent", "begun then killed")
    behave(**{f"lora_seed{seed}": how for seed, how in enumerate(failures)})
    assert compared(seeds="6", files=["lora.yaml"])[0] == 1
    behave()
    before = len(starts())
    code, said = compared(seeds="6", files=["lora.yaml"])
    assert (code, said) == (
        1,
        [
            "6 of 6 runs failed before; --retry-failed repeats them",
            "6 of 6 runs failed",
        ],
    )
    assert len(starts()) == before
    assert compared("--retry-failed", seeds="6", files=["lora.yaml"])[0] == 0
    assert starts()[before:] == [f"lora-seed{seed} overwrite" for seed in range(6)]
    assert not list(Path("comparison/runs").glob("*/launch.json"))


def test_a_retry_may_change_what_failed_and_nothing_else(compared):
    behave(lora_seed0="out_of_memory")
    compared()
    behave()
    smaller = "training.per_device_train_batch_size=4"
    code, said = compared(smaller, "--retry-failed")
    assert (code, len(said)) == (2, 1)
    assert said[0].startswith("comparison/runs/full-seed0: holds a run of other settings: ")
    assert compared(smaller, "--retry-failed", files=["lora.yaml"])[0] == 0
    assert starts()[-1] == "lora-seed0 overwrite"


def test_a_stopped_run_goes_on_where_its_checkpoint_is(compared, reports):
    behave(
        lora_seed0="interrupted",
        lora_seed1="terminated",
    )
    code, said = compared(seeds="2", files=["lora.yaml"])
    assert code == 1
    assert said[-2:] == [
        "stopped from outside: 2 of 2 runs are left; go on with",
        "peftkit compare lora.yaml --seeds 2",
    ]
    assert reports == []
    behave()
    code, said = compared(seeds="2", files=["lora.yaml"])
    assert code == 0
    assert said[0] == "[1/2] lora seed 0: started again, after step 4"
    assert starts()[2:] == ["lora-seed0 resume", "lora-seed1 overwrite"]


def test_what_a_killed_comparison_left_is_taken_up(compared):
    """No record and no launch.json: nobody was there to write one."""
    behave(full_seed0="saved then killed", lora_seed0="begun then killed")
    compared()
    for name in ("full-seed0", "lora-seed0"):
        (folder(name) / "launch.json").unlink()
    folder("full-seed1").mkdir()
    behave()
    assert compared(seeds="2")[0] == 0
    assert starts()[2:] == [
        "full-seed0 resume",
        "lora-seed0 overwrite",
        "full-seed1",
        "lora-seed1",
    ]


def test_a_crash_while_going_on_outweighs_the_older_record(compared):
    behave(lora_seed0="interrupted")
    compared(files=["lora.yaml"])
    behave(lora_seed0="killed")
    assert compared(files=["lora.yaml"])[0] == 1
    assert not (folder("lora-seed0") / "record.json").exists()
    assert compared(files=["lora.yaml"])[1][0] == (
        "1 of 1 runs failed before; --retry-failed repeats them"
    )
    assert len(starts()) == 2


def test_a_launcher_that_cannot_be_started_is_a_row(compared, monkeypatch):
    def fail(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(launch, "start", fail)
    code, said = compared()
    assert code == 1
    assert without_times(said)[0] == (
        "[1/2] full seed 0: failed: could not be started: Cannot allocate memory"
    )
    assert launch_file("lora-seed0")["error"] == "could not be started: Cannot allocate memory"


def test_runs_of_other_settings_are_refused_with_what_differs(compared):
    compared("training.num_train_epochs=1")
    code, said = compared("training.num_train_epochs=3")
    assert code == 2
    assert said == [
        f"comparison/runs/{name}-seed0: holds a run of other settings: "
        "training.num_train_epochs: then 1.0, now 3.0; give another --out, or remove that folder"
        for name in ("full", "lora")
    ]
    assert len(starts()) == 2


def test_a_comparison_may_be_seen_from_another_folder(compared, monkeypatch):
    compared(files=["lora.yaml"])
    Path("below").mkdir()
    monkeypatch.chdir("below")
    behave()
    assert compared("--out", "../comparison", files=["../lora.yaml"])[0] == 0
    assert starts() == []


def test_damaged_files_are_named(compared):
    compared()
    (folder("full-seed0") / "record.json").write_text("{}")
    (folder("lora-seed0") / "recipe.yaml").write_text("\t[")
    assert compared() == (
        2,
        [
            "comparison/runs/full-seed0/record.json: schema_version: missing; this is not a run "
            "record; or remove comparison/runs/full-seed0",
            "comparison/runs/lora-seed0/recipe.yaml: is damaged; remove comparison/runs/lora-seed0 "
            "and the run is repeated",
        ],
    )


def test_a_damaged_launch_file_still_says_that_the_run_failed(compared):
    behave(lora_seed0="killed")
    compared()
    (folder("lora-seed0") / "launch.json").write_text("[")
    assert compared()[0] == 1
    assert len(starts()) == 2


HOLD = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), 2); print(); input()"


@pytest.fixture
def held():
    """Lock a folder from another process."""
    others = []

    def held(path):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        others.append(subprocess.Popen([sys.executable, "-c", HOLD, path], **pipes))
        others[-1].stdout.readline()

    yield held
    for other in others:
        other.kill()
        other.communicate()


def test_a_run_that_is_still_at_work_is_not_started_again(compared, held):
    folder("lora-seed0").mkdir(parents=True)
    held(folder("lora-seed0"))
    assert compared() == (
        1,
        ["comparison/runs/lora-seed0: a run is at work in this folder; wait until it has ended"],
    )
    assert starts() == []


def test_two_comparisons_do_not_share_a_folder(compared, held):
    Path("comparison").mkdir()
    held("comparison")
    assert compared() == (
        1,
        [
            "comparison: another comparison, or a run that one left behind, is at work in this "
            "folder; wait until it has ended"
        ],
    )


def test_a_run_that_another_began_meanwhile_is_left_to_it(compared, held, monkeypatch):
    folder("lora-seed0").mkdir(parents=True)
    monkeypatch.setattr("peftkit.cli.comparison_folders.is_at_work", lambda _: False)
    held(folder("lora-seed0"))
    code, said = compared()
    assert code == 1
    assert "[2/2] lora seed 0: stopped: another run is at work in its folder" in (
        without_times(said)
    )
    assert not (folder("lora-seed0") / "launch.json").exists()


def test_a_launcher_that_is_left_behind_holds_the_lock(tmp_path):
    with locked(tmp_path, []) as descriptor:
        launcher = launch.start(
            [sys.executable, "-c", "input()"],
            environment=os.environ,
            output=None,
            keep_open=[descriptor],
        )
    try:
        assert is_at_work(tmp_path)
    finally:
        launcher.kill()
        launcher.wait()
    assert not is_at_work(tmp_path)


def test_runs_side_by_side_share_the_cores_and_are_marked(compared, environments, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    code, said = compared("--jobs", "2", seeds="3")
    assert code == 0
    assert said[0] == (
        "note: 2 runs at a time share this machine's processors and memory, so their seconds "
        "cannot be compared with those of runs on their own; the report says so"
    )
    assert sum(line.startswith("note:") for line in said) == 1
    assert Ended.most_alive == 2
    assert {environment["OMP_NUM_THREADS"] for environment in environments} == {"4"}
    assert yaml.safe_load(Path("comparison/comparison.yaml").read_text())["jobs"] == 2
    assert compared(seeds="4")[0] == 0
    assert environments[-1]["OMP_NUM_THREADS"] == "8"
    assert yaml.safe_load(Path("comparison/comparison.yaml").read_text())["jobs"] == 2


def test_the_users_own_number_of_threads_stays(compared, environments, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    compared("--jobs", "2")
    assert [environment["OMP_NUM_THREADS"] for environment in environments] == ["3", "3"]


def test_each_run_side_by_side_gets_a_gpu_where_there_are_enough(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert comparison_runs.own_gpus(2) == ["0", "1"]
    assert comparison_runs.own_gpus(3) == []
    assert comparison_runs.own_gpus(1) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in comparison_runs.environments(2)] == [
        "GPU-a",
        "GPU-b",
    ]


def test_the_plan_that_is_kept_does_the_same(compared, recipes):
    compared("training.max_steps=3", "--price-per-hour", "2.5", seeds="0,5")
    kept = recipes / "comparison" / "comparison.yaml"
    assert yaml.safe_load(kept.read_text()) == {
        "recipes": ["../full.yaml", "../lora.yaml"],
        "seeds": [0, 5],
        "overrides": ["training.max_steps=3"],
        "out": "comparison",
        "jobs": 1,
        "price_per_hour": 2.5,
    }
    before = kept.read_text()
    assert main(["compare", "comparison/comparison.yaml"]) == 0
    assert len(starts()) == 4
    assert kept.read_text() == before


def test_an_unusable_registry_is_told_once(compared, recipes, monkeypatch):
    (recipes / "file").touch()
    monkeypatch.setenv("PEFTKIT_REGISTRY", str(recipes / "file"))
    assert compared() == (
        1,
        [
            f"registry {recipes / 'file'}: {recipes / 'file'} is not a folder; "
            "name another in PEFTKIT_REGISTRY"
        ],
    )
    assert starts() == []


def test_nothing_is_left_running_behind_a_comparison_that_breaks(compared, monkeypatch):
    passed_on = []

    def broken(*_, **__):
        raise RuntimeError("no disk")

    monkeypatch.setattr(comparison_runs, "new_record", broken)
    monkeypatch.setattr(launch, "pass_on", lambda number, pid: passed_on.append((number, pid)))
    monkeypatch.setattr(Ended, "pid", 7, raising=False)
    monkeypatch.setattr(Ended, "wait", lambda self: None, raising=False)
    assert compared("--jobs", "2", seeds="2")[0] == 1
    assert passed_on == [(signal.SIGTERM, 7)]


def test_the_report_is_asked_for_by_folder_and_price(recipes, monkeypatch, capsys):
    comparison = SimpleNamespace(problems=["a record is damaged"])
    asked = []

    def read(folders, *, price_per_hour):
        asked.append((folders, price_per_hour))
        return comparison

    def write(given, out):
        asked.append((given, out))
        return [out / "comparison.html"]

    reading = SimpleNamespace(compare=read, write_comparison=write)
    printing = SimpleNamespace(print_comparison=lambda given: print("in short"))
    monkeypatch.setitem(sys.modules, "peftkit.reporting.comparison", reading)
    monkeypatch.setitem(sys.modules, "peftkit.cli.report", printing)
    compare.write_report(read_plan(["full.yaml"], {"price_per_hour": 1.5}))
    assert asked == [([Path("comparison")], 1.5), (comparison, Path("comparison"))]
    assert capsys.readouterr() == (
        "in short\n",
        "a record is damaged\ncomparison/comparison.html\n",
    )
