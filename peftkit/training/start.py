"""Starting Accelerate, saying what runs, and refusing what would not be what was asked.

Called by the experiment before anything is loaded; what can be wrong is in `launched`.
"""

import os
import platform
import socket
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, gather_object
from torch import nn

from peftkit.errors import SharedError
from peftkit.training import zero
from peftkit.training.config import TrainingConfig
from peftkit.training.launched import (
    LIBRARIES,
    Asked,
    fit_problems,
    launch_problems,
    read_launch,
    version_problems,
)
from peftkit.training.sharded import will_shard


def start_accelerator(config: TrainingConfig, *, quantised: bool = False) -> Accelerator:
    """The Accelerator of this process; the launcher decides the hardware.

    The main process says in one line what runs.

    Args:
        config: The recipe's section; its precision wins over the launcher's.
        quantised: Whether the method asks for a base in 4 bits.

    Raises:
        SharedError: the launch, the machine, the recipe or the processes among themselves do not
            fit; lists every problem that can be seen at that point.
    """
    asked = read_launch(config)
    _refuse(launch_problems(asked))
    # Said outright, or the launcher's own count would divide every loss once more.
    once = GradientAccumulationPlugin(num_steps=1)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision, gradient_accumulation_plugin=once
    )
    _refuse(_unlike(asked, accelerator))
    strategy, stage = accelerator.distributed_type.value, zero.stage_asked(accelerator)
    if stage:
        zero.load_whole()
    _refuse(fit_problems(config, strategy, zero_stage=stage, quantised=quantised))
    machines = _machines(accelerator)
    if accelerator.is_main_process:
        print(*_lines(accelerator, machines), sep="\n", file=sys.stderr, flush=True)
    return accelerator


def refuse_unlike(accelerator: Accelerator, conditions: Mapping[str, Any]) -> None:
    """See that every process has the same recipe, base and data.

    Args:
        accelerator: That of the run.
        conditions: By name, what must be alike, as JSON types.

    Raises:
        SharedError: a process has something else than the first; nothing would notice it later.
    """
    everyone = gather_object([dict(conditions)])
    unlike: dict[str, list[str]] = {}
    for rank, other in enumerate(everyone):
        for name in conditions:
            if other.get(name) != everyone[0].get(name):
                unlike.setdefault(name, []).append(str(rank))
    _refuse(
        [
            f"launch: {name} is not the same on rank 0 and on rank {', '.join(ranks)}; every "
            "machine needs the same files"
            for name, ranks in unlike.items()
        ]
    )


def _refuse(problems: list[str]) -> None:
    if problems:
        raise SharedError(problems)


def _unlike(asked: Asked, accelerator: Accelerator) -> list[str]:
    """What Accelerate made that is not what was asked."""
    problems = []
    if asked.processes != accelerator.num_processes:
        problems.append(
            f"launch: {asked.processes} processes were started, but Accelerate sees "
            f"{accelerator.num_processes}; launch with a file of accelerate_configs/"
        )
    became = accelerator.distributed_type.value
    if asked.strategy and became != asked.strategy:
        problems.append(f"launch: {asked.strategy} was asked for, but Accelerate made {became}")
    return problems


def _machines(accelerator: Accelerator) -> int:
    """Machines that take part, by their names.

    Raises:
        SharedError: the processes have different versions of a library.
    """
    own = {name: _version(name) for name in LIBRARIES} | {"machine": socket.gethostname()}
    everyone = gather_object([own])
    _refuse(version_problems(everyone))
    return len({one["machine"] for one in everyone})


def _version(name: str) -> str:
    if name == "python":
        return platform.python_version()
    try:
        return version(name)
    except PackageNotFoundError:  # run from a folder of sources
        return "not installed"


def _lines(accelerator: Accelerator, machines: int) -> list[str]:
    """What runs, in one line, and notes on what costs time."""
    device = accelerator.device
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    precision = {"no": "float32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    processes, stage = accelerator.num_processes, zero.stage_asked(accelerator)
    zero_stage = f" (ZeRO-{stage})" if stage else ""
    lines = [
        f"running: {processes} process{'es' if processes > 1 else ''} on {machines} "
        f"machine{'s' if machines > 1 else ''}, device {device.type}{name}, precision {precision}, "
        f"distributed type {accelerator.distributed_type.value}{zero_stage}"
    ]
    cores, threads = _usable_cores(), torch.get_num_threads()
    if device.type == "cpu" and processes == 1 and threads < cores:
        lines.append(
            f"note: this run uses {threads} of {cores} CPU cores, as OMP_NUM_THREADS is "
            f"{os.environ.get('OMP_NUM_THREADS')} (accelerate launch makes it 1 unless it is set)"
        )
    if device.type == "cpu" and accelerator.mixed_precision == "bf16":
        lines.append(
            "note: bf16 is emulated and many times slower than float32 on a CPU without "
            "avx512_bf16 or amx_bf16 in /proc/cpuinfo"
        )
    return lines


def place(model: nn.Module, accelerator: Accelerator) -> None:
    """Move a prepared model to this process's device, in place, unless it will be sharded there."""
    if not will_shard(accelerator):
        model.to(accelerator.device)


def _usable_cores() -> int:
    """CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
