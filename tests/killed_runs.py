"""Runs in processes that are killed at a chosen moment: `python killed_runs.py [LIBRARY ...]`.

Reads one job a line from stdin, answers with one line when its process has ended. Each process is
forked from this one, which has imported the libraries and run nothing: so a run takes a second.

A *moment* is a place in a run where it may be killed: before and after each step, in each
evaluation, and before each file or folder of the run that is made, renamed or removed.
"""

import json
import os
import signal
import sys
from pathlib import Path

STORED = ("trained.safetensors", "optimizer.pt", "rng.pt")
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}


class Moments:
    """Counts the moments of this process; kills it at number `fatal`."""

    def __init__(self, fatal: int | None) -> None:
        self.fatal, self.passed = fatal, []
        self.running = False

    def passing(self, name: str) -> None:
        if len(self.passed) == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        self.passed.append(name)

    def hook(self, event: str, arguments: tuple) -> None:
        """An audit hook: what the run does to the files in its folder."""
        if not self.running or event not in EVENTS or not isinstance(arguments[0], str | Path):
            return
        path = str(arguments[0])
        reading = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if "runs/" in path and not reading:
            self.passing(f"{event} {path.partition('runs/')[2]}")

    def around(self, owner, name: str) -> None:
        real = getattr(owner, name)

        def watched(*arguments, **settings):
            self.passing(f"before {name}")
            result = real(*arguments, **settings)
            self.passing(f"after {name}")
            return result

        setattr(owner, name, watched)


def carry_out(job: dict) -> None:
    """One run in this process; leaves the moments that it passed in `moments.json`."""
    from peftkit import experiment
    from peftkit.recipe import from_resolved
    from peftkit.training.checkpoints import CheckpointFolder
    from peftkit.training.loop import Trainer

    os.chdir(job["folder"])
    os.environ["PEFTKIT_REGISTRY"] = "registry"
    moments = Moments(job["fatal"])
    moments.around(Trainer, "_step")
    moments.around(Trainer, "_evaluate")
    sys.addaudithook(moments.hook)
    CheckpointFolder.clear = lambda self: None  # they are looked at afterwards
    experiment.foresee = lambda *_: None
    moments.running = True
    experiment.run_experiment(from_resolved(job["recipe"]), on_exists=job["on_exists"])
    moments.running = False
    Path("moments.json").write_text(json.dumps(moments.passed))


def main() -> None:
    import importlib

    from peftkit import experiment  # noqa: F401

    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                output = os.open(f"{job['folder']}/output.txt", os.O_WRONLY | os.O_CREAT)
                os.dup2(output, 1), os.dup2(output, 2)
                carry_out(job)
                code = 0
            finally:
                os._exit(code)
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    main()
