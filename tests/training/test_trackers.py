"""Trackers: they get what the log gets, go on when a run does, and cannot hurt it."""

import json
import random
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import tracking

from peftkit.errors import UsageError
from peftkit.training import trackers
from peftkit.training.signals import StopRequest
from peftkit.training.trackers import Trackers, refuse_missing


class Fake:
    """A tracker that notes what it is told; `fault` is called with the name of each call."""

    made: list["Fake"]
    fault = staticmethod(lambda call: None)

    def __init__(self, **arguments) -> None:
        self.made.append(self)
        self.arguments, self.config, self.rows, self.ended = arguments, None, [], False
        self.tracker = SimpleNamespace(info=SimpleNamespace(run_id="of-the-server"))
        self.fault("init")

    def start(self):
        self.fault("start")

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step):
        self.fault("log")
        self.rows.append((step, values))

    def finish(self):
        self.fault("finish")
        self.ended = True


@pytest.fixture
def fake(monkeypatch):
    """The fake in place of every tracker; the attribute `fault` can be set on it."""

    class Own(Fake):
        made = []

    for name in ("tensorboard", "wandb", "mlflow", "trackio"):
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, Own)
    return Own


def at(call, action):
    """A fault that lies in one call."""
    return staticmethod(lambda name: action() if name == call else None)


def fail():
    raise ConnectionError("nobody\nanswers")


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


CONFIG = {"seed": 0, "method": {"type": "lora", "target_modules": ["query", "value"]}, "x": None}
VALUES = {
    "seed": 0,
    "method.type": "lora",
    "method.target_modules": '["query", "value"]',
    "x": "null",
}


def test_a_tracker_gets_the_recipe_and_the_rows_of_the_log(make_trainer, tmp_path, fake):
    given = Trackers(["wandb", "wandb"], tmp_path, CONFIG)
    make_trainer(trackers=given, max_steps=3, eval_steps=3).fit(StopRequest())
    given.close()
    (tracker,) = fake.made
    assert tracker.config == VALUES
    assert tracker.ended
    logged = rows(tmp_path)
    assert [step for step, _ in tracker.rows] == [1, 2, 3, 3] == [row["step"] for row in logged]
    assert tracker.rows[2][1] == {
        key: logged[2][key] for key in ("epoch", "loss", "grad_norm", "learning_rate")
    }
    assert tracker.rows[3][1].keys() == {"holdout_loss", "holdout_score"}


def draw():
    torch.manual_seed(99)
    torch.rand(3)
    random.seed(99)
    np.random.seed(99)


def test_a_tracker_that_draws_at_random_changes_no_bit(make_trainer, parameters_of, tmp_path, fake):
    fake.fault = staticmethod(lambda call: draw())
    results = []
    for names in ([], ["mlflow"]):
        folder = tmp_path / str(len(names))
        folder.mkdir()
        trainer = make_trainer(folder, trackers=Trackers(names, folder), dropout=0.3, max_steps=5)
        trainer.fit(StopRequest())
        numbers = (torch.rand(1).item(), random.random(), np.random.rand())
        results.append((rows(folder), parameters_of(trainer), numbers))
    (expected, parameters, numbers), (found, others, others_numbers) = results
    assert len(fake.made[0].rows) == 6
    assert expected == found
    assert numbers[0] == others_numbers[0]
    assert all(torch.equal(parameters[n], others[n]) for n in parameters)


@pytest.mark.parametrize("name", ["python", "numpy"])
def test_the_other_generators_are_left_alone_as_well(tmp_path, fake, name):
    fake.fault = staticmethod(lambda call: draw())
    random.seed(1)
    np.random.seed(1)
    following = {"python": random.random, "numpy": np.random.rand}[name]
    state = random.getstate(), np.random.get_state()
    expected = following()
    random.setstate(state[0])
    np.random.set_state(state[1])
    given = Trackers(["trackio"], tmp_path)
    given.start(resumed_after=None)
    given.log({"step": 1})
    given.close()
    assert following() == expected


@pytest.mark.parametrize(
    ("call", "doing", "row_count"),
    [
        ("init", "starting", 0),
        ("start", "starting", 0),
        ("log", "logging step 1", 0),
        ("finish", "ending", 3),
    ],
)
@pytest.mark.parametrize("action", [fail, sys.exit], ids=["raises", "exits"])
def test_a_tracker_that_fails_says_so_once_and_the_others_go_on(
    tmp_path, capfd, monkeypatch, fake, call, doing, row_count, action
):
    class Good(Fake):
        made = []

    fake.fault = at(call, action)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Good)
    given = Trackers(["mlflow", "wandb"], tmp_path)
    given.start(resumed_after=None)
    for step in (1, 2, 3):
        given.log({"step": step, "loss": 0.5})
    given.close()
    reason = "ConnectionError: nobody answers" if action is fail else "SystemExit: "
    assert capfd.readouterr().err == (
        f"warning: the tracker mlflow failed in {doing} ({reason}) and is left out from here on; "
        "the run and its log.jsonl go on\n"
    )
    assert len(fake.made[0].rows) == row_count
    assert (len(Good.made[0].rows), Good.made[0].ended) == (3, True)


@pytest.mark.parametrize("call", ["start", "log", "finish"])
def test_a_tracker_that_waits_for_ever_is_left_behind(tmp_path, capfd, monkeypatch, fake, call):
    monkeypatch.setattr(trackers, "PATIENCE_SECONDS", 0.05)
    hung = threading.Event()
    fake.fault = at(call, lambda: hung.wait(5))
    given = Trackers(["wandb"], tmp_path)
    given.start(resumed_after=None)
    given.log({"step": 1})
    given.log({"step": 2})
    given.close()
    hung.set()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "(TimeoutError: no answer within 0.05 s)" in lines[0]


def test_what_a_tracker_prints_stays_off_stdout(tmp_path, capfd, fake):
    fake.fault = staticmethod(print)
    given = Trackers(["trackio"], tmp_path)
    given.start(resumed_after=None)
    given.close()
    assert capfd.readouterr() == ("", "init\nstart\nfinish\n")


NAMES = ["tensorboard", "wandb", "mlflow", "trackio"]


def test_a_resumed_run_goes_on_in_the_runs_that_it_has(tmp_path, fake):
    folder = tmp_path / "tiny-seed0"
    folder.mkdir()
    for after in (None, 4):
        given = Trackers(NAMES, folder, CONFIG)
        given.start(resumed_after=after)
        given.close()
    first, second = fake.made[:4], fake.made[4:]
    assert [tracker.config for tracker in first] == [VALUES] * 4
    assert [tracker.config for tracker in second] == [None] * 4
    board, wandb, mlflow, trackio = (tracker.arguments for tracker in second)
    place = {"run_name": "tensorboard", "logging_dir": folder / "tracking"}
    assert (first[0].arguments, board) == (place, {**place, "purge_step": 5})
    assert wandb == first[1].arguments
    assert (wandb["resume"], wandb["name"]) == ("allow", "tiny-seed0")
    assert (first[2].arguments["run_id"], mlflow["run_id"]) == (None, "of-the-server")
    assert trackio["name"] == first[3].arguments["name"]
    assert trackio["name"].startswith("tiny-seed0-")


def test_a_run_from_the_start_is_another_run_in_every_tracker(tmp_path, fake):
    for number in (1, 2):
        folder = tmp_path / str(number) / "tiny-seed0"
        folder.mkdir(parents=True)
        Trackers(["wandb", "trackio"], folder).start(resumed_after=None)
    assert len({tracker.arguments["id"] for tracker in fake.made[::2]}) == 2
    assert len({tracker.arguments["name"] for tracker in fake.made[1::2]}) == 2


def test_a_package_that_is_not_there_is_named_in_one_line(monkeypatch):
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.TENSORBOARD])
    refuse_missing([])
    refuse_missing(["tensorboard"])
    with pytest.raises(UsageError) as raised:
        refuse_missing(["wandb", "tensorboard", "trackio"])
    assert raised.value.problems == [
        f"training.report_to: '{name}' needs the package {name}, which is not installed; "
        f"run `pip install {name}`, or leave it out"
        for name in ("wandb", "trackio")
    ]


def test_tensorboard_shows_a_resumed_run_as_one_curve(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the package tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for after, steps in ((None, (1, 2, 3)), (1, (2, 3, 4))):
        given = Trackers(["tensorboard"], tmp_path, CONFIG)
        given.start(resumed_after=after)
        for step in steps:
            given.log({"step": step, "total_steps": 4, "loss": step + (0.5 if after else 0.0)})
        given.close()
    events = EventAccumulator(str(tmp_path / "tracking" / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    curve = [(event.step, event.value) for event in events.Scalars("loss")]
    assert curve == [(1, 1.0), (2, 2.5), (3, 3.5), (4, 4.5)]
