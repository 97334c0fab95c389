"""A run that is killed at any moment and resumed is the run that nothing has happened to."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from killed_runs import STORED

from peftkit.recipe import from_resolved

pytestmark = pytest.mark.slow

KILLS = 20
FOLDER = "runs/tiny-seed0"
METHODS = {
    "full": {"type": "full"},
    "top_layers": {"type": "top_layers", "num_layers": 1},
    "lora": {"type": "lora", "lora_dropout": 0.1},
    "qlora": {"type": "qlora", "lora_dropout": 0.1},
}
TRAINING = {
    "learning_rate": 3e-2,
    "num_train_epochs": 6.0,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 3,
    "dropout": 0.2,
    "eval_steps": 3,
    "save_steps": 4,
    "logging_steps": 1,
    "metric_for_best_model": "loss",
    "early_stopping_patience": 3,
}
MEASURED = ("train_seconds", "train_cpu_seconds", "metered_seconds", "eval_seconds", "examples")
MEASURED += ("tokens", "meter", "resumed_after")


LIBRARIES = ["bitsandbytes", "datasets", "evaluate", "peft", "sklearn.metrics"]
LIBRARIES += ["transformers.models.bert.modeling_bert"]


@pytest.fixture(scope="module")
def forks(request):
    """The process that forks one for each run; a parameter names what it has imported."""
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(
        [sys.executable, str(here / "killed_runs.py"), *getattr(request, "param", LIBRARIES)],
        env=environment,
        **pipes,
    )
    yield process
    process.stdin.close()
    process.wait()
    process.stdout.close()


@pytest.fixture
def run(forks, tiny_recipe, tmp_path):
    """Run in a folder of its own, killed at a moment or to the end; returns the folder."""

    def run(name, method, *, fatal=None, on_exists="resume", **training):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        content = {**tiny_recipe, "method": method, "training": {**TRAINING, **training}}
        recipe = from_resolved(content).resolved()
        job = {"folder": str(folder), "recipe": recipe, "fatal": fatal, "on_exists": on_exists}
        forks.stdin.write(f"{json.dumps(job)}\n")
        forks.stdin.flush()
        ended = os.waitstatus_to_exitcode(int(forks.stdout.readline()))
        expected = 0 if fatal is None else -signal.SIGKILL
        assert ended == expected, (folder / "output.txt").read_text()[-2000:]
        return folder

    return run


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def outcome(folder):
    """All that must be equal: delta, optimizer, schedule, random numbers, losses, the best."""
    (delta,) = (folder / "registry/deltas").iterdir()
    checkpoints = sorted((folder / FOLDER / "checkpoints").iterdir())
    last = checkpoints[-1]
    state = json.loads((last / "state.json").read_text())
    return {
        "delta": {n: d for n, d in digests(delta).items() if n.endswith(".safetensors")},
        "kept": [path.name for path in checkpoints],
        "stored": {name: digests(last)[name] for name in STORED},
        "best": digests(last.parent / f"best-{state['best_step']:08d}")["trained.safetensors"],
        "state": {key: value for key, value in state.items() if key not in MEASURED},
        "log": (folder / FOLDER / "log.jsonl").read_text(),
        "metrics": json.loads((folder / FOLDER / "record.json").read_text())["metrics"],
    }


def chosen(moments, rng):
    """Numbers of the moments to be killed at: 8 in a save, the others in or between steps."""
    saving = [n for n, name in enumerate(moments) if "/checkpoints" in name]
    others = [n for n, name in enumerate(moments) if name.startswith(("before", "after"))]
    return sorted([*rng.sample(saving, 8), *rng.sample(others, KILLS - 8)])


@pytest.mark.parametrize("forks", [[]], indirect=True)
def test_what_a_resumed_process_imports_later_makes_no_difference(run):
    """scikit-learn draws a random number when it is imported: at the first evaluation."""
    whole = run("whole", METHODS["full"], save_steps=1)
    moments = json.loads((whole / "moments.json").read_text())
    run("killed", METHODS["full"], fatal=moments.index("before _evaluate"), save_steps=1)
    again = run("killed", METHODS["full"], save_steps=1)
    assert outcome(again) == outcome(whole)


@pytest.mark.parametrize("method", METHODS)
def test_killed_anywhere_and_resumed_equals_uninterrupted(run, method):
    section = METHODS[method]
    whole = run("whole", section)
    moments, expected = json.loads((whole / "moments.json").read_text()), outcome(whole)
    state = expected["state"]
    assert state["best_step"] < state["step"] < 48  # stopped early, and after the first epoch
    assert state["step"] > 8
    rng, bad = random.Random(method), []
    for fatal in chosen(moments, rng):
        name = f"killed-{fatal}"
        run(name, section, fatal=fatal)
        if rng.random() < 0.3:  # once more, soon after it has been taken up
            run(name, section, fatal=rng.randrange(4))
        if outcome(run(name, section)) != expected:
            bad.append(f"moment {fatal}: {moments[fatal]}")
    assert bad == []
