"""One run in processes of its own, started by `accelerate launch`.

Called by the verbs `run` and `compare`; starts the installed `peftkit/run.py`, which leaves its
exit code in a file because every launcher turns a child's code into 1. `run.py` comes in by
`run_and_leave_exit_code`.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

import peftkit
from peftkit.cli.failures import exit_code_of
from peftkit.errors import SIGNALLED, Interrupted, RunError, UsageError
from peftkit.training.signals import end_with_the_launcher

SCRIPT = Path(peftkit.__file__).with_name("run.py")
EXIT_FILE = "PEFTKIT_EXIT_FILE"
"""Names the file in which the first process of a run leaves its exit code."""
POLL_SECONDS = 0.2
QUIET_LAUNCHER = "peftkit.cli.launcher"

FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP")
CONFIG_FILE_FLAG = "--config_file"
PROCESSES_FLAG = "--num_processes"


def launch(script_arguments: Sequence[str], *, nproc: int | None, extra: Sequence[str]) -> int:
    """Run `peftkit/run.py` with `script_arguments` and wait; return the run's own exit code.

    Args:
        script_arguments: What follows `run.py` on the command line.
        nproc: Processes on this machine; None leaves it to `extra` or Accelerate's config file.
        extra: Arguments for `accelerate launch`; they win over the defaults.

    Raises:
        UsageError: more processes than this machine has accelerators.
        RunError: the run ended without leaving an exit code.
        Interrupted: it did so because of Ctrl-C or SIGTERM, before it had begun.
    """
    with tempfile.TemporaryDirectory(prefix="peftkit-") as folder:
        exit_file = Path(folder) / "exit_code"
        environment = launch_environment(os.environ, nproc=nproc, extra=extra)
        ended = supervise(
            launch_command(script_arguments, nproc=nproc, extra=extra),
            environment={**environment, EXIT_FILE: str(exit_file)},
        )
        return _own_exit_code(exit_file, ended)


def launch_command(
    script_arguments: Sequence[str], *, nproc: int | None = None, extra: Sequence[str] = ()
) -> list[str]:
    """The words that start one run; the arguments are those of `launch`."""
    module = "accelerate.commands.launch" if "--debug" in script_arguments else QUIET_LAUNCHER
    launcher = [sys.executable, "-m", module, *launch_arguments(nproc, extra)]
    return [*launcher, str(SCRIPT), *script_arguments]


def launch_arguments(nproc: int | None, extra: Sequence[str]) -> list[str]:
    """Arguments of `accelerate launch`: explicit where it would warn about a default.

    With a config file (named in `extra`, or the user's own) nothing is preset, so the file rules.
    Port 0 makes Accelerate take a free one, so that two launches on a machine do not meet.
    """
    arguments = ["--quiet"]
    if _config_file(extra) is None:
        arguments += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        arguments += [PROCESSES_FLAG, str(nproc or 1)]
    elif nproc is not None:
        arguments += [PROCESSES_FLAG, str(nproc)]
    if nproc is not None and nproc > 1:
        arguments.append("--multi_gpu")
        if _config_file(extra) is None and _value(extra, "--num_machines") is None:
            arguments += ["--main_process_port", "0"]
    return [*arguments, *extra]


def launch_environment(
    inherited: Mapping[str, str],
    *,
    nproc: int | None = None,
    extra: Sequence[str] = (),
    jobs: int = 1,
) -> dict[str, str]:
    """The environment of the launcher; `jobs` is the number of runs that share the machine.

    `--multi_gpu` with ACCELERATE_USE_CPU is the one way in which Accelerate starts several
    processes on a CPU. OMP_NUM_THREADS is set because its launcher would otherwise make it 1.
    """
    environment = dict(inherited)
    if _value(extra, PROCESSES_FLAG) is None and _config_file(extra) is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        threads = (cores or 1) // ((nproc or 1) * jobs)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
    several = nproc if nproc and nproc > 1 else 0
    if _names_the_cpu(_config_file(extra)) or (several and _accelerators(at_least=several) == 0):
        environment["ACCELERATE_USE_CPU"] = "true"
    return environment


def _accelerators(*, at_least: int) -> int:
    """Accelerators of this machine.

    Raises:
        UsageError: there are some, but fewer than `at_least`.
    """
    import torch

    found = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if 0 < found < at_least:
        raise UsageError(f"--nproc {at_least}: this machine has {found} accelerators; at most that")
    return found


def _config_file(extra: Sequence[str]) -> Path | None:
    """The file that rules the launch: named in `extra`, or the user's own."""
    named = _value(extra, CONFIG_FILE_FLAG)
    if named is not None:
        return Path(named)
    folder = Path(os.environ.get("HF_HOME") or Path("~/.cache/huggingface").expanduser())
    own = [folder / "accelerate" / f"default_config.{kind}" for kind in ("yaml", "json")]
    return next((file for file in own if file.is_file()), None)


def _names_the_cpu(file: Path | None) -> bool:
    """Whether the file says `use_cpu`; a file that cannot be read is Accelerate's to refuse."""
    try:
        said = yaml.safe_load(file.read_text(encoding="utf-8")) if file else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(said, dict) and said.get("use_cpu") is True


def _value(extra: Sequence[str], flag: str) -> str | None:
    """What `extra` gives a flag, in either notation."""
    for word, following in zip(extra, [*extra[1:], ""], strict=False):
        if word == flag:
            return following
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None


def supervise(command: Sequence[str], *, environment: Mapping[str, str]) -> int:
    """Run `command`; pass each Ctrl-C, SIGTERM and SIGHUP on to the run exactly once.

    Returns:
        The launcher's exit code; 128 + 2 if it died because of a Ctrl-C, for which it got SIGTERM.
    """
    passed: list[signal.Signals] = []
    with noted_signals() as pending:
        process = start(command, environment=environment)
        while True:
            try:
                ended = process.wait(timeout=POLL_SECONDS)
            except subprocess.TimeoutExpired:
                while pending:
                    passed.append(pending.pop(0))
                    pass_on(passed[-1], process.pid)
            else:
                by_us = passed and killing_signal(ended) == signal.SIGTERM
                interrupted = by_us and passed[0] == signal.SIGINT
                return SIGNALLED + signal.SIGINT if interrupted else ended


def start(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    output: int | None = None,
    keep_open: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a launcher and do not wait.

    It gets a session of its own: a Ctrl-C on the terminal then reaches only this process, and not
    every process of the run a first time before it is passed on.

    Args:
        command: From `launch_command`.
        environment: From `launch_environment`.
        output: Descriptor that gets what the run says, which then reads nothing; None: the streams
            of this process.
        keep_open: Descriptors that the launcher inherits.
    """
    return subprocess.Popen(
        command,
        env=dict(environment),
        start_new_session=True,
        stdin=None if output is None else subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=keep_open,
    )


@contextmanager
def noted_signals() -> Iterator[list[signal.Signals]]:
    """Collect the forwarded signals instead of dying of them; one that was ignored stays so."""
    pending: list[signal.Signals] = []
    numbers = [getattr(signal, name) for name in FORWARDED if hasattr(signal, name)]
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, lambda caught, _: pending.append(signal.Signals(caught)))
    try:
        yield pending
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def pass_on(number: signal.Signals, launcher: int) -> None:
    """Signal the run; a lost terminal counts as SIGTERM, so that a record is left."""
    workers = _workers(launcher)
    if number == getattr(signal, "SIGHUP", None) or not workers:
        number = signal.SIGTERM
    for pid in workers or [launcher]:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _workers(launcher: int) -> list[int]:
    """Who has to get a signal, empty before the run has started.

    The launcher of one process only waits for it and passes nothing on, so its child is meant.
    The launcher of several starts each in a session of its own and passes signals on itself.
    """
    import psutil  # type: ignore[import-untyped]

    try:
        children = [child.pid for child in psutil.Process(launcher).children()]
        own = [pid for pid in children if os.getpgid(pid) == launcher]
    except (psutil.NoSuchProcess, ProcessLookupError):
        return []
    return own or ([launcher] if children else [])


def run_and_leave_exit_code(run: Callable[[list[str]], int]) -> int:
    """Inside the run: carry out `sys.argv` and leave the exit code where `launch` looks for it."""
    end_with_the_launcher()
    code = exit_code_of(lambda: run(sys.argv[1:]), debug="--debug" in sys.argv)
    exit_file = os.environ.get(EXIT_FILE)
    if exit_file and os.environ.get("LOCAL_RANK", "0") == "0":
        with suppress(FileNotFoundError):  # whoever made its folder was killed
            Path(exit_file).write_text(str(code))
    return code


def _own_exit_code(exit_file: Path, ended: int) -> int:
    if ended == 0 or exit_file.is_file():
        return int(exit_file.read_text()) if exit_file.is_file() else 0
    if ended == UsageError.exit_code:
        return ended  # accelerate launch refused its arguments and has said so
    number = killing_signal(ended)
    if number in (signal.SIGINT, signal.SIGTERM):
        raise Interrupted(number)
    if number:
        raise RunError(
            f"the run ended without a result: {number.name} killed it, most often for lack of "
            "memory; see the lines above"
        )
    raise RunError(
        f"the run ended without a result (launcher: {ended}); it was stopped before it began or "
        "killed from outside, most often for lack of memory; see the lines above"
    )


def killing_signal(ended: int) -> signal.Signals | None:
    """The signal that a run or its launcher died of, by the launcher's exit code."""
    number = -ended if ended < 0 else ended - SIGNALLED
    try:
        return signal.Signals(number) if number > 0 else None
    except ValueError:
        return None
