"""The command as a process and as a function: what it loads, prints and returns."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import peftkit
from peftkit.cli import main, take_debug

ROOT = Path(peftkit.__file__).parent.parent
HEAVY = {"torch", "transformers", "peft", "datasets", "accelerate", "evaluate", "sklearn", "rich"}
VERBS = [
    "run",
    "validate",
    "show",
    "ls",
    "cp",
    "report",
    "evaluate",
    "predict",
    "doctor",
    "schema",
    "plugins",
]


def process(*arguments, code=None):
    command = [sys.executable, *(["-c", code] if code else ["-m", "peftkit"]), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("arguments", [["--help"], ["adapters", "ls"], ["ls"]])
def test_light_verbs_load_nothing_heavy(arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTKIT_REGISTRY", str(tmp_path))
    code = (
        "import sys; from peftkit.cli import main; main(sys.argv[1:]); "
        "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    done = process(*arguments, code=code)
    loaded = set(done.stderr.splitlines()[-1].split())
    assert "typer" in loaded
    assert loaded & HEAVY == set()


def test_the_package_runs_as_a_module():
    done = process("--version")
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        f"peftkit {peftkit.__version__}\n",
        "",
    )


@pytest.mark.parametrize("verb", [[v] for v in VERBS] + [["adapters", "ls"], ["adapters", "show"]])
def test_every_verb_explains_itself_with_an_example(verb, capsys):
    assert main([*verb, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"Usage: peftkit {' '.join(verb)}" in shown
    assert f"Example: peftkit {' '.join(verb)}" in shown


def test_every_verb_is_listed(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    listed = [
        line.split()[0] for line in shown.splitlines() if line.startswith("  ") and line.split()
    ]
    assert set(VERBS) | {"adapters"} <= set(listed)


@pytest.mark.parametrize("arguments", [["nope"], ["run"], ["run", "--nope"], ["ls", "--nope"], []])
def test_a_wrong_command_line_exits_2_without_a_traceback(arguments, capsys):
    assert main(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_expected_failure_is_its_lines_on_stderr(tmp_path, capsys):
    missing = tmp_path / "none.yaml"
    assert main(["show", str(missing)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"{missing}: cannot be read: No such file or directory\n"


@pytest.mark.parametrize("position", [0, 1, 2])
def test_debug_shows_the_traceback_wherever_it_stands(position, tmp_path, capsys):
    arguments = ["show", str(tmp_path / "none.yaml")]
    arguments.insert(position, "--debug")
    assert main(arguments) == 2
    assert "Traceback" in capsys.readouterr().err


def test_what_follows_two_dashes_is_not_for_the_command():
    assert take_debug(["run", "x", "--", "--debug"]) == (["run", "x", "--", "--debug"], False)
    assert take_debug(["run", "--debug", "x", "--", "y"]) == (["run", "x", "--", "y"], True)


def test_a_reader_that_stops_early_sees_no_complaint():
    code = "import sys; from peftkit.cli import main; sys.exit(main(['plugins', '--json']))"
    command = [sys.executable, "-c", code]
    # Unbuffered, the first write would meet the closed pipe, and not the last flush.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, **pipe) as running:
        running.stdout.close()
        said = running.stderr.read()
        assert running.wait() == 1
    assert said == b""


def ended(redirection):
    """Exit code and stderr of `peftkit plugins` under a shell's redirection."""
    code = "import sys; from peftkit.cli import main; sys.exit(main(['plugins']))"
    shell = f'"{sys.executable}" -c "{code}" {redirection}'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", shell], env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-"])
def test_closed_streams_are_nobody_reading(closed):
    assert ended(closed) == (0, "")
