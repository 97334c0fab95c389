"""What a run ran on: library versions, the device, the commit of the working directory.

Called by the experiment for the run record; imports nothing of peftkit, and torch only to name
the device. Nothing here fails a run: what cannot be found out is left out or None.
"""

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

LIBRARIES = (
    "peftkit",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "trl",
    "evaluate",
    "safetensors",
    "tokenizers",
    "numpy",
)
GIT_TIMEOUT_SECONDS = 10


class GitState(NamedTuple):
    """Commit checked out, and whether tracked files differ from it. None: unknown."""

    commit: str | None
    dirty: bool | None


def library_versions() -> dict[str, str]:
    """Python's version and that of each installed library, without importing any."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def device_description(device: "torch.device | None" = None) -> str:
    """The device in words; None describes the accelerator if there is one, else the CPU."""
    import torch

    if device is None:
        device = torch.accelerator.current_accelerator(check_available=True)
    if device is None or device.type == "cpu":
        return f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    return device.type


def git_state(cwd: Path) -> GitState:
    """State of the repository that holds `cwd`; untracked files do not make it dirty."""
    commit = _git(cwd, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return GitState(None, None)
    changes = _git(cwd, "status", "--porcelain", "--untracked-files=no")
    return GitState(commit.strip(), None if changes is None else bool(changes))


def _git(cwd: Path, *arguments: str) -> str | None:
    # A git hook sets GIT_DIR and others, which would answer for its repository and not for cwd's.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
