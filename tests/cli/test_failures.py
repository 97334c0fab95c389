"""Exceptions become lines on stderr and a code of 0, 1 or 2, or 128 + a signal's number."""

import signal

import pytest

from peftkit.cli import failures
from peftkit.cli.failures import exit_code_of
from peftkit.errors import (
    DataError,
    Interrupted,
    PeerError,
    PeftkitError,
    RecipeError,
    SharedError,
)

UNEXPECTED = "(unexpected; rerun with --debug for the traceback)"


def raiser(error):
    def action():
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (RecipeError(["a:1: x", "a:2: y"]), 2, "a:1: x\na:2: y\n"),
        (DataError("train: no rows"), 1, "train: no rows\n"),
        (Interrupted(signal.SIGINT), 130, "stopped by SIGINT\n"),
        (
            Interrupted(signal.SIGTERM, saved_step=4),
            143,
            "stopped by SIGTERM; --resume goes on after step 4\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            ValueError("two\n  lines"),
            1,
            "ValueError: two lines (unexpected; rerun with --debug for the traceback)\n",
        ),
        (
            AssertionError(),
            1,
            "AssertionError (unexpected; rerun with --debug for the traceback)\n",
        ),
        (SystemExit(143), 143, ""),
        (SystemExit(129), 1, ""),
        (SystemExit(2), 2, ""),
        (SystemExit(None), 0, ""),
        (SystemExit("text"), 1, ""),
    ],
)
def test_a_failure_has_its_code_and_lines(error, code, lines, capsys):
    assert exit_code_of(raiser(error), debug=False) == code
    assert capsys.readouterr() == ("", lines)


@pytest.mark.parametrize(("result", "code"), [(0, 0), (1, 1), (2, 2), (None, 0), (7, 1)])
def test_a_result_is_the_code(result, code):
    assert exit_code_of(lambda: result, debug=False) == code


def test_debug_adds_the_traceback(capsys):
    assert exit_code_of(raiser(ValueError("odd")), debug=True) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "ValueError: odd"


FIRST = {"RANK": "0", "LOCAL_RANK": "0"}
SECOND = {"RANK": "1", "LOCAL_RANK": "1"}
FIRST_OF_SECOND_MACHINE = {"RANK": "8", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("error", "ranks", "said", "waits"),
    [
        (PeftkitError(["a", "b"]), SECOND, "rank 1: a\nrank 1: b\n", True),
        (PeftkitError(["a", "b"]), FIRST, "a\nb\n", False),
        (KeyError("odd"), SECOND, f"rank 1: KeyError: 'odd' {UNEXPECTED}\n", True),
        (PeerError("failed", "rank 1: no memory"), FIRST, "", False),
        (RecipeError("every rank sees it"), FIRST, "every rank sees it\n", False),
        (RecipeError("every rank sees it"), SECOND, "", True),
        (RecipeError("every rank sees it"), FIRST_OF_SECOND_MACHINE, "", True),
        (SharedError("no GPU"), FIRST, "no GPU\n", False),
        (SharedError("no GPU"), SECOND, "", True),
        (Interrupted(signal.SIGTERM, saved_step=4), SECOND, "", False),
        (Interrupted(signal.SIGTERM), SECOND, "", False),
        (SharedError("no GPU"), FIRST_OF_SECOND_MACHINE, "rank 8: no GPU\n", False),
    ],
)
def test_what_every_process_finds_is_said_once(error, ranks, said, waits, monkeypatch, capsys):
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    waited = []
    monkeypatch.setattr(failures.time, "sleep", waited.append)
    monkeypatch.setattr(failures.signal, "signal", lambda *_: None)
    exit_code_of(raiser(error), debug=False)
    assert capsys.readouterr().err == said
    assert waited == [failures.SPEAKER_SECONDS] * waits
