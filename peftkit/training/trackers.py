"""TensorBoard, Weights & Biases, MLflow and trackio, where a recipe names them in `report_to`.

Opened by the experiment; the progress hands on each row that it logs. The trackers themselves are
Accelerate's. They are guests: a fault of theirs costs one line on stderr, and no number of the run.
"""

import json
import os
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import redirect_stdout
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from peftkit.errors import UsageError
from peftkit.staging import write_file
from peftkit.training import rng

FOLDER = "tracking"
"""In the run's folder: TensorBoard's and wandb's files, and which run of a tracker is this one."""
PROJECT = "peftkit"
PATIENCE_SECONDS = 60.0
"""How long a tracker may take to start, to take a row or to end."""

MAX_REASON_CHARACTERS = 300

_RUNS = "runs.json"
_NO_VALUES = ("step", "total_steps")
_Call = tuple[Callable[[], None], "Future[None]"]


def refuse_missing(names: Sequence[str]) -> None:
    """See that the packages of these trackers are there.

    Raises:
        UsageError: some are not; one line each.
    """
    from accelerate.tracking import get_available_trackers

    there = {str(tracker) for tracker in get_available_trackers()}
    missing = [name for name in names if name not in there]
    if missing:
        raise UsageError(
            f"training.report_to: '{name}' needs the package {name}, which is not installed; "
            f"run `pip install {name}`, or leave it out"
            for name in missing
        )


class Trackers:
    """The trackers of one run.

    Args:
        names: Of `training.report_to`; empty on processes other than the main one.
        folder: The run's; its name is the run's in every tracker.
        config: The resolved recipe, which trackers show beside the curves.
    """

    def __init__(
        self, names: Sequence[str] = (), folder: Path = Path(), config: Mapping[str, Any] = {}
    ) -> None:
        settings = {key: _plain(value) for key, value in _flat(config).items()}
        self._guests = [_Guest(name, folder, settings) for name in dict.fromkeys(names)]

    def start(self, *, resumed_after: int | None) -> None:
        """Open each tracker; a resumed run goes on in the run that it has there."""
        for guest in self._guests:
            guest.start(resumed_after)

    def log(self, row: Mapping[str, Any]) -> None:
        """Hand on one row of the log; `row` has at least `step`."""
        for guest in self._guests:
            guest.log(row)

    def close(self) -> None:
        """End each tracker that is still there."""
        for guest in self._guests:
            guest.end()


class _Guest:
    """One tracker, in a thread of its own for as long as it behaves.

    Not the loop's thread, so that one that waits for a dead network can be left behind; and one
    thread for all its calls, as MLflow's active run belongs to the thread that started it.
    """

    def __init__(self, name: str, folder: Path, settings: Mapping[str, Any]) -> None:
        self._name, self._folder, self._settings = name, folder, settings
        self._tracker: Any = None
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._is_there = True
        Thread(target=_serve, args=(self._calls,), name=name, daemon=True).start()

    def start(self, resumed_after: int | None) -> None:
        self._ask("starting", lambda: self._open(resumed_after))

    def log(self, row: Mapping[str, Any]) -> None:
        values = {key: value for key, value in row.items() if key not in _NO_VALUES}
        step = row["step"]
        self._ask(f"logging step {step}", lambda: self._tracker.log(values, step=step))

    def end(self) -> None:
        if self._tracker is not None:
            self._ask("ending", lambda: self._tracker.finish())
        self._calls.put(None)

    def _open(self, resumed_after: int | None) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        folder = self._folder / FOLDER
        known = _known_runs(folder)
        arguments = _arguments(self._name, folder, known.get(self._name), resumed_after)
        tracker = LOGGER_TYPE_TO_CLASS[self._name](**arguments)
        tracker.start()
        if self._name not in known:
            tracker.store_init_configuration(dict(self._settings))
            run = tracker.tracker.info.run_id if self._name == "mlflow" else arguments.get("id")
            name = arguments.get("name")
            runs = {**known, self._name: run or name or self._name}
            write_file(folder / _RUNS, json.dumps(runs).encode())
        self._tracker = tracker

    def _ask(self, doing: str, action: Callable[[], None]) -> None:
        """Let the tracker's thread do it, and wait; after a first failure do nothing any more."""
        if not self._is_there:
            return
        answer: Future[None] = Future()
        # Trackers print on stdout and draw names at random.
        with rng.untouched(), redirect_stdout(sys.stderr):
            self._calls.put((action, answer))
            try:
                error = answer.exception(PATIENCE_SECONDS)
            except TimeoutError:
                error = TimeoutError(f"no answer within {PATIENCE_SECONDS:g} s")
        if error is not None:
            self._leave(doing, error)

    def _leave(self, doing: str, error: BaseException) -> None:
        self._is_there = False
        text = " ".join(str(error).split())[:MAX_REASON_CHARACTERS]
        # Not by `warnings`: where those are errors, they would stop the run.
        print(
            f"warning: the tracker {self._name} failed in {doing} ({type(error).__name__}: {text}) "
            "and is left out from here on; the run and its log.jsonl go on",
            file=sys.stderr,
            flush=True,
        )


def _serve(calls: SimpleQueue["_Call | None"]) -> None:
    """What a tracker's thread does until it is told to end."""
    while (call := calls.get()) is not None:
        action, answer = call
        try:
            action()
            answer.set_result(None)
        except BaseException as error:  # also a SystemExit of the tracker's
            answer.set_exception(error)


def _arguments(
    name: str, folder: Path, known: str | None, resumed_after: int | None
) -> dict[str, Any]:
    """What Accelerate's class of the tracker is made with.

    Args:
        name: The tracker's.
        folder: Where its files go.
        known: What this run is there; None before it has been there.
        resumed_after: Step after which the run goes on; what a tracker holds beyond it is hidden
            where it can be.
    """
    run, fresh = folder.parent.name, uuid.uuid4().hex[:12]
    if name == "tensorboard":
        purge = {} if resumed_after is None else {"purge_step": resumed_after + 1}
        return {"run_name": "tensorboard", "logging_dir": folder, **purge}
    if name == "mlflow":
        return {"experiment_name": PROJECT, "run_name": run, "run_id": known}
    project = os.environ.get(f"{name.upper()}_PROJECT", PROJECT)
    if name == "wandb":
        own = {"id": known or fresh, "name": run, "dir": folder}
    else:
        own = {"name": known or f"{run}-{fresh}"}
    return {"run_name": project, "resume": "allow", **own}


def _known_runs(folder: Path) -> dict[str, str]:
    """Tracker → what this run is called there, of those that it has started in."""
    folder.mkdir(exist_ok=True)
    file = folder / _RUNS
    return json.loads(file.read_text()) if file.is_file() else {}


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key → value."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        inner = _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else None
        found |= inner if inner is not None else {f"{prefix}{key}": value}
    return found


def _plain(value: Any) -> bool | int | float | str:
    """TensorBoard takes nothing else."""
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)
