"""A stand-in for `peftkit/run.py` that trains nothing: it claims its folder and ends as it is told.

In the process of a test, or as a script that waits for a signal. `behaviour.json` in the current
folder says how the run of a folder ends; each start adds a line to `starts.txt`.
"""

import json
import os
import signal
import sys
import time
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

from peftkit.recipe import load_recipe, resolved_yaml
from peftkit.reporting.record import RunRecord, write_record
from peftkit.run import parse
from peftkit.run_folder import _claim

KILLED = 128 + signal.SIGKILL
ERRORS = {
    "completed": None,
    "failed": "the head\nfell off",
    "out_of_memory": "out of memory; halve it",
    "non_finite": "step 3: loss nan",
    "interrupted": "stopped by SIGINT; --resume goes on after step 4",
    "terminated": "stopped by SIGTERM",
}
NO_PEAKS = {"allocated_bytes": 1, "reserved_bytes": None, "resident_bytes": 2}


def behave(**by_folder):
    """`lora_seed0="failed"`: how runs end from now on; those that are not named complete."""
    text = json.dumps({name.replace("_", "-"): how for name, how in by_folder.items()})
    Path("behaviour.json").write_text(text)


def starts():
    """Folder and flags of each start so far."""
    file = Path("starts.txt")
    return file.read_text().splitlines() if file.is_file() else []


def carry_out(argv):
    """One run; returns the launcher's exit code."""
    arguments = parse(argv)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    folder = recipe.run_folder
    flag = f" {arguments.on_exists}" if arguments.on_exists else ""
    with Path("starts.txt").open("a") as stream:
        stream.write(f"{folder.name}{flag}\n")
    behaviour = json.loads(Path("behaviour.json").read_text())
    how = behaviour.get(folder.name, "completed")
    if how == "killed":
        return KILLED
    if how == "silent":
        print("a warning\nno registry today\n", file=sys.stderr, flush=True)
        return 1
    with ExitStack() as held:
        text = resolved_yaml(recipe)
        if problem := _claim(folder, text, arguments.on_exists or "refuse", held):
            print(problem, file=sys.stderr)
            return 1
        return _inside(recipe, how)


def _inside(recipe, how):
    folder = recipe.run_folder
    if how in ("interrupted", "saved then killed", "waits"):
        (folder / "checkpoints" / "step-00000004").mkdir(parents=True, exist_ok=True)
    if how == "waits":
        how = _wait(folder)
    if how.endswith("then killed"):
        return KILLED
    write_record(folder / "record.json", record_of(recipe, how))
    return 0 if how == "completed" else 1


def _wait(folder):
    """Until a signal, or a file of this name, says that it is enough."""
    got = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: got.append(n))
    row = {"step": 4, "total_steps": 10, "loss": 0.5}
    (folder / "log.jsonl").write_text(f"{json.dumps(row)}\n")
    end = time.monotonic() + 240
    while not got and not Path("go").exists():
        assert time.monotonic() < end, "no signal came"
        time.sleep(0.02)
    if not got:
        return "completed"
    return "interrupted" if got[0] == signal.SIGINT else "terminated"


def record_of(recipe, status, *, seconds=60.0):
    """A record that ended as `status` says."""
    digest = f"sha256:{'a' * 64}"
    now = datetime.now(UTC)
    return RunRecord(
        name=recipe.name,
        status=status,
        error=ERRORS[status],
        recipe=recipe.resolved(),
        recipe_digest=recipe.digest(),
        seed=recipe.seed,
        metrics={"validation": {"loss": 0.5, "accuracy": 0.875}} if status == "completed" else {},
        history=[],
        memory={"load": NO_PEAKS},
        seconds=dict.fromkeys(("load", "tokenise", "train", "train_cpu", "eval", "metered")),
        examples_per_second=None,
        tokens_per_second=None,
        optimizer_steps=10,
        trainable_parameters=1,
        total_parameters=2,
        delta_bytes=None,
        delta=None,
        digests={
            "base": digest,
            "data_train": digest,
            "data_validation": digest,
            "recipe": recipe.digest(),
        },
        learning_rates_tried=[],
        libraries={},
        device="CPU",
        processes=1,
        mixed_precision="no",
        distributed_type="NO",
        git_commit=None,
        git_dirty=None,
        predictions=None,
        stand_in=False,
        origins={"base": "path", "data": "path"},
        started=now,
        finished=now + timedelta(seconds=seconds),
    )


LAUNCHER = """
import subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
sys.exit(128 - code if code < 0 else code)
"""
"""Waits for its child and passes nothing on, as Accelerate's does for one process."""


def launch_command(script_arguments, **_):
    """In the place of `cli.launch.launch_command`."""
    return [sys.executable, "-c", LAUNCHER, sys.executable, __file__, *script_arguments]


if __name__ == "__main__":
    ended = carry_out(sys.argv[1:])
    if ended == KILLED:
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(ended)
