"""Progress: plain lines, a bar on a terminal, nothing from other ranks, one log."""

import io
import json
import sys

import pytest

from peftkit.errors import RunError
from peftkit.training.progress import Progress
from peftkit.training.trackers import Trackers

ROW = {"step": 3, "total_steps": 9, "epoch": 0.5, "loss": 0.123456, "learning_rate": 5e-05}


def progress(log, **changes):
    return Progress(
        log, Trackers(), **{"total_steps": 9, "resumed_after": None, "visible": True, **changes}
    )


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_on_stderr_where_there_is_no_terminal(tmp_path, capfd):
    shown = progress(tmp_path / "log.jsonl")
    shown.step()
    shown.report(ROW)
    shown.close()
    out, err = capfd.readouterr()
    assert (out, err) == ("", "step 3/9  epoch 0.5  loss 0.1235  learning_rate 5e-05\n")
    assert json.loads((tmp_path / "log.jsonl").read_text()) == ROW


def test_a_log_that_cannot_be_written_ends_in_one_line(tmp_path):
    log = tmp_path / "log.jsonl"
    log.mkdir()  # stands for a full disk
    shown = progress(tmp_path / "other.jsonl")
    shown._log = log
    for attempt in (lambda: progress(log), lambda: shown.report(ROW)):
        with pytest.raises(RunError) as raised:
            attempt()
        assert str(raised.value) == (
            f"{log}: the log cannot be written: Is a directory; once that is mended, --resume goes "
            "on after the last checkpoint"
        )


def test_a_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    shown = progress(tmp_path / "log.jsonl", resumed_after=2)
    shown.step()
    shown.report(ROW)
    shown.report({"step": 3, "holdout_accuracy": 0.75})
    shown.close()
    text = terminal.getvalue()
    assert "3/9" in text
    assert "step 3/9  holdout_accuracy 0.75\n" in text
    assert "\nstep 3/9  epoch" not in text
    assert "loss 0.1235" in text
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("after", "line"),
    [(7, "resuming after step 7\n"), (0, "resuming after step 0, as there is no checkpoint\n")],
)
def test_a_resumed_run_says_where_it_goes_on(tmp_path, capfd, after, line):
    progress(tmp_path / "log.jsonl", resumed_after=after)
    assert capfd.readouterr() == ("", line)


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_silent_on_other_ranks(tmp_path, capsys, monkeypatch, stream):
    terminal = stream()
    monkeypatch.setattr(sys, "stderr", terminal)
    (tmp_path / "log.jsonl").write_text('{"step": 5}\n')
    shown = progress(tmp_path / "log.jsonl", visible=False)
    shown.step()
    shown.report(ROW)
    shown.close()
    assert (terminal.getvalue(), capsys.readouterr().out) == ("", "")
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 5}\n'


def test_log_is_json_even_of_numbers_that_json_lacks(tmp_path):
    shown = progress(tmp_path / "log.jsonl")
    shown.report({"step": 1, "holdout_f1": float("nan"), "grad_norm": float("inf")})
    line = (tmp_path / "log.jsonl").read_text()
    assert line == '{"step": 1, "holdout_f1": null, "grad_norm": null}\n'


@pytest.mark.parametrize("torn", ["", '{"step": 3, "lo', '{"step": 3, "loss": 0.1', "7\n", "{}\n"])
def test_resumed_log_keeps_the_rows_up_to_its_step(tmp_path, torn):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "a": 1}\n{"step": 3}\n' + torn)
    progress(log, resumed_after=2).report({"step": 3, "loss": 1.0})
    assert log.read_text() == (
        '{"step": 1}\n{"step": 2}\n{"step": 2, "a": 1}\n{"step": 3, "loss": 1.0}\n'
    )
