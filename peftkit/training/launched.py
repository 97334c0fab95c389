"""What a launcher asked of this process, and why this machine or this recipe cannot have it.

Called by `start`; reads the variables that torchrun and `accelerate launch` set, and asks torch
for the devices. Changes nothing. Problems come as lines; an empty list means that all is well.
"""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate.utils import DistributedType

from peftkit.training.config import TrainingConfig

PRECISIONS = ("no", "bf16", "fp16")
EIGHT_BIT = ("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")
LIBRARIES = (
    "python",
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "deepspeed",
    "datasets",
    "safetensors",
    "numpy",
    "peftkit",
)
"""Those of which all processes need one version."""

Strategy = Literal["FSDP", "DEEPSPEED"]
_DEEPSPEED = (
    "config_file",
    "zero_stage",
    "zero3_init",
    "offload_optimizer_device",
    "offload_param_device",
)


@dataclass(frozen=True)
class Asked:
    """A launch in words. `processes` are all, `here` those of this machine."""

    processes: int
    here: int
    strategy: Strategy | None
    cpu: bool
    precision: str

    @property
    def on_cpu(self) -> bool:
        """Whether the run will be on the CPU, asked or not."""
        return self.cpu or not torch.accelerator.is_available()


def read_launch(config: TrainingConfig) -> Asked:
    """What the environment and the recipe ask for; the recipe's precision wins."""
    strategies: tuple[Strategy, ...] = ("FSDP", "DEEPSPEED")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return Asked(
        processes=processes,
        here=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        strategy=next((s for s in strategies if _is_on(f"ACCELERATE_USE_{s}")), None),
        cpu=_is_on("ACCELERATE_USE_CPU"),
        precision=config.mixed_precision or _launched_precision(),
    )


def launch_problems(asked: Asked) -> list[str]:
    """Why the launch cannot be what was asked, before Accelerate is started."""
    absent = _absent_hardware(asked)
    if absent:
        return [absent]  # the rest would be about a machine that is not there
    return [*_process_problems(asked), *_strategy_problems(asked), *_precision_problems(asked)]


def _absent_hardware(asked: Asked) -> str | None:
    """A launch for GPUs where the run would be on the CPU."""
    if not asked.on_cpu:
        return None
    if asked.strategy:
        return (
            f"launch: {asked.strategy} is asked for and needs GPUs; on a CPU Accelerate would make "
            "something else of it in silence; take accelerate_configs/cpu_ddp.yaml"
        )
    if asked.cpu:
        return None
    if asked.processes > 1:
        return (
            f"launch: {asked.processes} processes were started for GPUs, and this machine has "
            "none; for processes on the CPU set ACCELERATE_USE_CPU=true, as "
            "accelerate_configs/cpu_ddp.yaml says"
        )
    launched = _launched_precision()
    if launched == "bf16" or (launched == "fp16" and asked.precision != "fp16"):
        return (
            f"launch: mixed precision {launched} was launched without naming the CPU, and this "
            "machine has no GPU; add --cpu, or set ACCELERATE_USE_CPU=true, if the CPU is meant"
        )
    return None


def _process_problems(asked: Asked) -> list[str]:
    problems = []
    devices = 0 if asked.on_cpu else torch.accelerator.device_count()
    if devices and asked.here > devices:
        problems.append(
            f"launch: {asked.here} processes were started on this machine, which has {devices} "
            f"devices; at most one process a device: --num_processes {devices}"
        )
    if asked.cpu and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        problems.append(
            "launch: MASTER_ADDR is set, as for several processes, but one was started: MULTI_CPU "
            "does that in silence; take accelerate_configs/cpu_ddp.yaml, or unset MASTER_ADDR"
        )
    if _is_on("ACCELERATE_USE_PARALLELISM_CONFIG"):
        problems.append(
            "launch: parallelism_config is not supported: each process trains on data of its own; "
            "take a file of accelerate_configs/"
        )
    return problems


def _strategy_problems(asked: Asked) -> list[str]:
    problems = []
    if asked.strategy == "FSDP" and os.environ.get("FSDP_VERSION", "1") != "2":
        problems.append(
            "launch: FSDP version 1 is asked for, only version 2 is supported; set fsdp_version: "
            "2, as accelerate_configs/fsdp2.yaml does"
        )
    if asked.strategy == "FSDP" and _is_on("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        problems.append(
            "launch: fsdp_cpu_ram_efficient_loading leaves all processes but one with empty "
            "weights, which cannot be checked; set it to false, as accelerate_configs/fsdp2.yaml "
            "does"
        )
    if asked.strategy == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        problems.append(
            "launch: DeepSpeed is asked for and not installed; pip install 'peftkit[deepspeed]', "
            "or take accelerate_configs/fsdp2.yaml"
        )
    if asked.strategy == "DEEPSPEED":
        problems += _deepspeed_problems(asked)
    return problems


def _deepspeed_problems(asked: Asked) -> list[str]:
    """Settings of DeepSpeed's under which it would do something else than the recipe says."""
    of = {name: os.environ.get(f"ACCELERATE_DEEPSPEED_{name.upper()}") for name in _DEEPSPEED}
    problems = []
    if of["config_file"]:
        problems.append(
            "launch: deepspeed_config_file can set an optimizer, a schedule and a precision that "
            "are not the recipe's; take the keys of accelerate_configs/zero2.yaml in its place"
        )
    elif of["zero_stage"] not in (None, "1", "2", "3"):
        problems.append(f"launch: zero_stage {of['zero_stage']} shares out nothing; take 1, 2 or 3")
    if (of["zero3_init"] or "").lower() == "true":
        problems.append(
            "launch: zero3_init_flag leaves no process with weights that can be checked; set it to "
            "false, as accelerate_configs/zero3.yaml does"
        )
    if {of["offload_optimizer_device"], of["offload_param_device"]} - {None, "none"}:
        problems.append(
            "launch: DeepSpeed's offload puts an optimizer of its own in the place of the "
            "recipe's; take accelerate_configs/fsdp2_offload.yaml"
        )
    if asked.precision == "fp16":
        problems.append(
            "launch: mixed precision fp16 under DeepSpeed scales the loss by rules of its own; "
            "take bf16, or accelerate_configs/fsdp2.yaml"
        )
    return problems


def _precision_problems(asked: Asked) -> list[str]:
    named = f"launch: mixed precision {asked.precision}"
    if asked.precision not in PRECISIONS:
        return [f"{named} is not supported; choose one of {', '.join(PRECISIONS)}"]
    if asked.precision == "fp16" and asked.on_cpu:
        return [f"{named} needs a GPU, and this run is on the CPU; take no, or bf16"]
    if asked.precision == "bf16" and not asked.on_cpu and not _computes_bf16():
        return [
            f"{named}: this GPU does not compute in bfloat16, it would be emulated; take fp16, as "
            "accelerate_configs/gpu_fp16.yaml does"
        ]
    return []


def fit_problems(
    config: TrainingConfig, strategy: str, *, zero_stage: int | None, quantised: bool
) -> list[str]:
    """What of the recipe cannot be had under a strategy, by Accelerate's word for it."""
    zero = strategy == DistributedType.DEEPSPEED.value
    name = f"ZeRO-{zero_stage}" if zero else strategy
    problems = []
    if quantised and zero and zero_stage == 3:
        problems.append(
            "method: a base in 4 bits cannot be shared out by ZeRO-3; take "
            "accelerate_configs/fsdp2_qlora.yaml, or ddp.yaml if it fits one GPU"
        )
    if zero and config.optimizer in (*EIGHT_BIT, "adagrad"):
        problems.append(
            f"training.optimizer: {config.optimizer} does not work under {name}, which keeps "
            "optimizer state in pieces of its own; take adamw"
        )
    if config.l1 and (zero or strategy == DistributedType.FSDP.value):
        problems.append(
            f"training.l1: under {name} a process sees only its shard of the weights, so their "
            "norm would be wrong; set it to 0, or launch with DDP"
        )
    if config.auto_batch_size and (zero or strategy == DistributedType.FSDP.value):
        problems.append(
            f"training.auto_batch_size: under {name} a process without memory would leave the "
            "others waiting for its shard; set training.per_device_train_batch_size "
            "(`peftkit plan` says what fits)"
        )
    return problems


def version_problems(versions: Sequence[Mapping[str, str]]) -> list[str]:
    """Libraries of which the processes, by rank, do not all have one version."""
    problems = []
    for library in LIBRARIES:
        ranks: dict[str, list[str]] = {}
        for rank, found in enumerate(versions):
            ranks.setdefault(found[library], []).append(str(rank))
        if len(ranks) > 1:
            listed = "; ".join(f"{found} on rank {', '.join(who)}" for found, who in ranks.items())
            problems.append(
                f"launch: {library} is not the same everywhere: {listed}; install one version"
            )
    return problems


def _computes_bf16() -> bool:
    """Whether the device does, and not the driver in its place; other accelerators are trusted."""
    if not torch.cuda.is_available():
        return True
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _launched_precision() -> str:
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")
