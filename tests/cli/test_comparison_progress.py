"""What a person sees of a comparison: steps, time left, lines in a pipe, a table on a terminal."""

import io
import json
import sys
import time
from types import SimpleNamespace

import pytest
from fake_runs import record_of

from peftkit.cli import comparison_progress
from peftkit.cli.comparison_plan import PlannedRun
from peftkit.cli.comparison_progress import Lines, display, visible
from peftkit.cli.comparison_rows import (
    Row,
    duration,
    left_words,
    run_seconds_left,
    seconds_left,
    tally,
)
from peftkit.recipe import from_resolved

NOW = 1_800_000_000.0


@pytest.fixture
def row(tiny_recipe, workplace):
    """A row of the recipe `name`, in the state and with the times that are given."""

    def row(name="a", seed=0, task="start", **values):
        recipe = from_resolved({**tiny_recipe, "name": name, "seed": seed})
        return Row(PlannedRun(f"{name}.yaml", recipe, ()), task, **values)

    return row


def running(row, name="a", *, seconds, step=0, **values):
    """A run that began `seconds` ago, took 10 to load, and has just logged `step` of 100."""
    steps = {"step": step, "total_steps": 100, "stepped": NOW} if step else {}
    first = (values.get("first_step", 0) + 5, NOW - seconds + 10)
    return row(name, state="running", begun=NOW - seconds, seen_first=first, **steps, **values)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, "-"),
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 00 min"),
        (90_000, "25 h 00 min"),
    ],
)
def test_durations_are_told_as_people_say_them(seconds, words):
    assert duration(seconds) == words


def test_a_running_run_is_judged_by_its_steps(row):
    one = running(row, seconds=30, step=25)
    assert run_seconds_left(one, [one], NOW) == pytest.approx(75)
    assert run_seconds_left(one, [one], NOW + 20) == pytest.approx(55)
    assert run_seconds_left(one, [one], NOW + 500) == 0
    resumed = running(row, seconds=30, step=75, first_step=50)
    assert run_seconds_left(resumed, [resumed], NOW) == pytest.approx(25)
    just_begun = running(row, seconds=30, step=5)
    assert run_seconds_left(just_begun, [just_begun], NOW) is None


def test_without_steps_a_run_is_judged_by_those_of_its_recipe_that_are_done(row):
    done = [row(state="done", seconds=s) for s in (50.0, 70.0)]
    resumed = row(state="done", seconds=5.0, first_step=90)
    one = running(row, seconds=20)
    assert run_seconds_left(one, [*done, resumed, one], NOW) == pytest.approx(40)
    assert run_seconds_left(done[0], done, NOW) is None


def test_the_whole_is_shared_by_the_jobs_and_no_shorter_than_its_longest_run(row):
    rows = [row(state="done", seconds=60.0), running(row, seconds=20), row(seed=2), row(seed=3)]
    assert seconds_left(rows, jobs=1, now=NOW) == pytest.approx(160)
    assert seconds_left(rows, jobs=2, now=NOW) == pytest.approx(80)
    long = [running(row, seconds=20, step=10), row(seed=1)]
    assert seconds_left(long, jobs=1, now=NOW) == pytest.approx(180 + 200)
    assert seconds_left(long, jobs=4, now=NOW) == pytest.approx(180)


def test_a_recipe_that_has_not_run_yet_counts_like_the_others(row):
    rows = [row("a", state="done", seconds=40.0), row("b", state="done", seconds=80.0), row("c")]
    assert seconds_left(rows, jobs=1, now=NOW) == pytest.approx(60)


def test_nothing_is_foretold_from_nothing(row):
    rows = [running(row, seconds=3), row(seed=1)]
    assert seconds_left(rows, jobs=1, now=NOW) is None
    assert left_words(rows, jobs=1, now=NOW) == "time left not known yet"
    assert left_words([row(state="failed")], jobs=1, now=NOW) == "nothing left"


def test_a_tally_names_what_there_is(row):
    rows = [row(state=state) for state in ("done", "waiting", "waiting", "failed")]
    assert tally(rows) == "4 runs: 1 done, 1 failed, 2 waiting"
    assert tally(rows[1:2]) == "1 runs: 0 done, 1 waiting"


def write_log(row, *lines):
    row.run.folder.mkdir(parents=True, exist_ok=True)
    (row.run.folder / "log.jsonl").write_text("\n".join(lines))


def test_steps_come_from_the_last_whole_row_of_training(row):
    one = row(state="running", begun=time.time() - 5)
    one.read_log()
    assert one.total_steps is None
    steps = [json.dumps({"step": n, "total_steps": 900, "loss": 0.5}) for n in range(1, 400)]
    write_log(one, *steps, '{"step": 399, "holdout_loss": 1.0}', '{"step": 400, "total_st')
    one.read_log()
    assert (one.step, one.total_steps) == (399, 900)


def test_a_log_from_before_the_start_is_not_believed(row):
    one = row(state="running", begun=time.time() + 60)
    write_log(one, '{"step": 4, "total_steps": 9}')
    one.read_log()
    assert one.step == 0


def test_a_resumed_run_begins_at_its_newest_checkpoint(row):
    one = row(task="resume")
    for name in ("step-00000004", "step-00000012", "best-00000020"):
        (one.run.folder / "checkpoints" / name).mkdir(parents=True)
    one.begin()
    assert one.first_step == 12


@pytest.mark.parametrize(
    ("status", "state", "detail"),
    [
        ("completed", "done", "accuracy 0.8750"),
        ("failed", "failed", "the head fell off"),
        ("out_of_memory", "failed", "out of memory; halve it"),
        ("non_finite", "failed", "non finite: step 3: loss nan"),
        ("interrupted", "stopped", "stopped by SIGINT; --resume goes on after step 4"),
        ("terminated", "stopped", "stopped by SIGTERM"),
    ],
)
def test_each_status_has_its_state_and_its_line(row, status, state, detail):
    one = row()
    one.end_with(record_of(one.run.recipe, status, seconds=12.0))
    assert (one.state, one.detail, one.seconds) == (state, detail, 12.0)


def test_a_pipe_gets_plain_lines_that_begin_with_the_number(row, capsys):
    rows = [row("a"), row("b")]
    with display(rows, jobs=1) as shown:
        assert isinstance(shown, Lines)
        rows[1].begin()
        shown.began(rows[1])
        shown.draw()
        rows[1].end_with(record_of(rows[1].run.recipe, "completed"))
        rows[1].seconds = 61.0
        shown.ended(rows[1])
    assert capsys.readouterr() == (
        "",
        "[2/2] b seed 0: started\n"
        "[2/2] b seed 0: done: accuracy 0.8750 (1 min 01 s); about 1 min 01 s left\n",
    )


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_table_that_is_drawn_again(row, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(comparison_progress, "SECONDS_BETWEEN_DRAWINGS", 0.0)
    rows = [row("a"), row("b"), row("c")]
    with display(rows, jobs=1) as shown:
        rows[0].begin()
        shown.began(rows[0])
        rows[0].step, rows[0].total_steps = 4, 10
        shown.draw()
        assert "step 4/10" in terminal.getvalue()
        rows[0].end_without_record("failed", "killed by [red]signal 9")
        shown.ended(rows[0])
        shown.say("SIGINT: waiting")
    last = terminal.getvalue().rpartition("recipe")[2]
    assert "killed by [red]signal 9" in last
    assert "3 runs: 0 done, 1 failed, 2 waiting" in last
    assert "SIGINT: waiting" in last
    assert "left not known" not in last


def test_a_low_terminal_shows_the_rows_around_what_runs(row):
    states = ["done"] * 10 + ["running", "running"] + ["waiting"] * 10
    rows = [SimpleNamespace(state=state, number=n) for n, state in enumerate(states)]
    assert [r.number for r in visible(rows, 6)] == [8, 9, 10, 11, 12, 13]
    assert [r.number for r in visible(rows[:12], 5)] == [7, 8, 9, 10, 11]
    assert [r.number for r in visible(rows[:10], 4)] == [6, 7, 8, 9]
    assert [r.number for r in visible(rows[10:], 4)] == [10, 11, 12, 13]
    assert visible(rows, 22) == rows
