"""Starting: what runs is said, and what is not what was asked is refused."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from peftkit.errors import SharedError
from peftkit.training import start
from peftkit.training.config import TrainingConfig
from peftkit.training.launched import (
    LIBRARIES,
    fit_problems,
    launch_problems,
    read_launch,
    version_problems,
)
from peftkit.training.start import start_accelerator

LAUNCH_VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "FSDP_VERSION"),
    *("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_CPU"),
    *("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_PARALLELISM_CONFIG"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING",
)


@pytest.fixture(autouse=True)
def _launched_by_nobody(monkeypatch):
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def machine(monkeypatch):
    """A machine with so many GPUs, which compute in bfloat16 or do not."""

    def machine(gpus, *, bf16=True):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)

        def is_supported(including_emulation=True):
            return bf16 or including_emulation

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)

    return machine


def config(**changes):
    return TrainingConfig(learning_rate=1.0, **changes)


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}
CPU = {"ACCELERATE_USE_CPU": "true"}
TWO = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}
FP16_ON_CPU = (
    "launch: mixed precision fp16 needs a GPU, and this run is on the CPU; take no, or bf16"
)
NEEDS_GPUS = (
    "is asked for and needs GPUs; on a CPU Accelerate would make something else of it in silence; "
    "take accelerate_configs/cpu_ddp.yaml"
)


@pytest.mark.parametrize(
    ("gpus", "environment", "changes", "problem"),
    [
        (
            0,
            TWO,
            {},
            "launch: 2 processes were started for GPUs, and this machine has none; for processes "
            "on the CPU set ACCELERATE_USE_CPU=true, as accelerate_configs/cpu_ddp.yaml says",
        ),
        (0, TWO | FSDP, {}, f"launch: FSDP {NEEDS_GPUS}"),
        (2, TWO | FSDP | CPU, {}, f"launch: FSDP {NEEDS_GPUS}"),
        (0, DEEPSPEED, {}, f"launch: DEEPSPEED {NEEDS_GPUS}"),
        (
            1,
            TWO,
            {},
            "launch: 2 processes were started on this machine, which has 1 devices; at most one "
            "process a device: --num_processes 1",
        ),
        (
            0,
            CPU | {"MASTER_ADDR": "127.0.0.1"},
            {},
            "launch: MASTER_ADDR is set, as for several processes, but one was started: MULTI_CPU "
            "does that in silence; take accelerate_configs/cpu_ddp.yaml, or unset MASTER_ADDR",
        ),
        (
            2,
            TWO | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"},
            {},
            "launch: parallelism_config is not supported: each process trains on data of its own; "
            "take a file of accelerate_configs/",
        ),
        (
            2,
            TWO | FSDP | {"FSDP_VERSION": "1"},
            {},
            "launch: FSDP version 1 is asked for, only version 2 is supported; set fsdp_version: "
            "2, as accelerate_configs/fsdp2.yaml does",
        ),
        (
            2,
            TWO | FSDP | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            {},
            "launch: fsdp_cpu_ram_efficient_loading leaves all processes but one with empty "
            "weights, which cannot be checked; set it to false, as accelerate_configs/fsdp2.yaml "
            "does",
        ),
        (
            2,
            TWO | DEEPSPEED,
            {},
            "launch: DeepSpeed is asked for and not installed; pip install 'peftkit[deepspeed]', "
            "or take accelerate_configs/fsdp2.yaml",
        ),
        (
            0,
            CPU,
            {"mixed_precision": "fp16"},
            FP16_ON_CPU,
        ),
        (
            0,
            {"ACCELERATE_MIXED_PRECISION": "fp16"},
            {},
            FP16_ON_CPU,
        ),
        *(
            (
                0,
                {"ACCELERATE_MIXED_PRECISION": launched},
                {"mixed_precision": "no"},
                f"launch: mixed precision {launched} was launched without naming the CPU, and this "
                "machine has no GPU; add --cpu, or set ACCELERATE_USE_CPU=true, if the CPU is "
                "meant",
            )
            for launched in ("bf16", "fp16")
        ),
        (
            0,
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
            {},
            "launch: mixed precision bf16 was launched without naming the CPU, and this machine "
            "has no GPU; add --cpu, or set ACCELERATE_USE_CPU=true, if the CPU is meant",
        ),
        (
            1,
            {"ACCELERATE_MIXED_PRECISION": "fp8"},
            {},
            "launch: mixed precision fp8 is not supported; choose one of no, bf16, fp16",
        ),
    ],
)
def test_a_launch_that_would_be_something_else_is_refused(
    gpus, environment, changes, problem, machine, monkeypatch
):
    machine(gpus)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(start, "Accelerator", lambda **_: pytest.fail("was started"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SharedError) as refused:
        start_accelerator(config(**changes))
    assert refused.value.problems == [problem]


@pytest.mark.parametrize(
    ("settings", "changes", "start"),
    [
        ({"CONFIG_FILE": "ds.json"}, {}, "launch: deepspeed_config_file can set an optimizer"),
        ({"ZERO_STAGE": "0"}, {}, "launch: zero_stage 0 shares out nothing; take 1, 2 or 3"),
        ({"ZERO3_INIT": "true"}, {}, "launch: zero3_init_flag leaves no process with weights"),
        ({"OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, {}, "launch: DeepSpeed's offload puts an optimizer"),
        ({"OFFLOAD_PARAM_DEVICE": "nvme"}, {}, "launch: DeepSpeed's offload puts an optimizer"),
        ({}, {"mixed_precision": "fp16"}, "launch: mixed precision fp16 under DeepSpeed scales"),
        ({"ZERO_STAGE": "3", "OFFLOAD_PARAM_DEVICE": "none"}, {"mixed_precision": "bf16"}, None),
    ],
)
def test_deepspeed_is_refused_where_it_would_not_do_what_the_recipe_says(
    settings, changes, start, machine, monkeypatch
):
    machine(2)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    for name, value in (TWO | DEEPSPEED).items():
        monkeypatch.setenv(name, value)
    for name, value in settings.items():
        monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{name}", value)
    found = launch_problems(read_launch(config(**changes)))
    assert [line.startswith(start) for line in found] == ([True] if start else [])


def test_bf16_is_refused_where_it_would_be_emulated(machine):
    machine(1, bf16=False)
    assert launch_problems(read_launch(config(mixed_precision="bf16"))) == [
        "launch: mixed precision bf16: this GPU does not compute in bfloat16, it would be "
        "emulated; take fp16, as accelerate_configs/gpu_fp16.yaml does"
    ]
    machine(1, bf16=True)
    assert launch_problems(read_launch(config(mixed_precision="bf16"))) == []


@pytest.mark.parametrize(
    ("gpus", "environment", "changes"),
    [
        (0, {}, {}),
        (0, {}, {"mixed_precision": "bf16"}),
        (0, CPU | {"ACCELERATE_MIXED_PRECISION": "bf16"}, {}),
        (0, CPU | {"ACCELERATE_MIXED_PRECISION": "fp16"}, {"mixed_precision": "no"}),
        (0, TWO | CPU, {}),
        (0, TWO | CPU | {"MASTER_ADDR": "127.0.0.1"}, {}),
        (1, {"ACCELERATE_MIXED_PRECISION": "fp16"}, {}),
        (2, TWO | FSDP, {}),
        (2, {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}, {}),
    ],
)
def test_a_launch_that_can_be_had_is_not_refused(gpus, environment, changes, machine, monkeypatch):
    machine(gpus)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launch_problems(read_launch(config(**changes))) == []


ZERO = "under ZeRO-3"


@pytest.mark.parametrize(
    ("strategy", "changes", "quantised", "starts"),
    [
        (
            "DEEPSPEED",
            {},
            True,
            ["method: a base in 4 bits cannot be shared out by ZeRO-3; take "],
        ),
        (
            "DEEPSPEED",
            {"optimizer": "adamw_8bit", "l1": 0.1},
            False,
            [
                f"training.optimizer: adamw_8bit does not work {ZERO}",
                f"training.l1: {ZERO} a process sees only its shard",
            ],
        ),
        ("FSDP", {"l1": 0.1}, True, ["training.l1: under FSDP a process sees only its shard"]),
        ("FSDP", {"auto_batch_size": True}, False, ["training.auto_batch_size: under FSDP"]),
        (
            "DEEPSPEED",
            {"auto_batch_size": True},
            False,
            ["training.auto_batch_size: under ZeRO-3"],
        ),
        (
            "DEEPSPEED",
            {"optimizer": "adagrad"},
            False,
            [f"training.optimizer: adagrad does not work {ZERO}"],
        ),
        ("DEEPSPEED", {"optimizer": "sgd"}, False, []),
        ("MULTI_GPU", {"l1": 0.1, "optimizer": "adamw_8bit", "auto_batch_size": True}, True, []),
        ("FSDP", {"optimizer": "adamw_8bit"}, True, []),
        ("NO", {"l1": 0.1}, True, []),
    ],
)
def test_what_a_strategy_cannot_do_is_refused(strategy, changes, quantised, starts):
    stage = 3 if strategy == "DEEPSPEED" else None
    found = fit_problems(config(**changes), strategy, zero_stage=stage, quantised=quantised)
    assert len(found) == len(starts), found
    assert all(line.startswith(begin) for line, begin in zip(found, starts, strict=True))


def versions(**changes):
    same = dict.fromkeys(LIBRARIES, "1.0")
    return {**same, **changes}


def test_versions_that_differ_are_named_with_their_ranks():
    everyone = [versions(), versions(peft="2.0"), versions(), versions(peft="2.0", torch="3.0")]
    assert version_problems(everyone) == [
        "launch: torch is not the same everywhere: 1.0 on rank 0, 1, 2; 3.0 on rank 3; install "
        "one version",
        "launch: peft is not the same everywhere: 1.0 on rank 0, 2; 2.0 on rank 1, 3; install "
        "one version",
    ]
    assert version_problems([versions(), versions()]) == []


@pytest.mark.usefixtures("fresh_accelerate_state")
def test_mixed_versions_stop_the_start(monkeypatch):
    other = {"torch": "0.1", "machine": "b"}
    monkeypatch.setattr(start, "gather_object", lambda own: [*own, own[0] | other])
    with pytest.raises(SharedError, match=r"^launch: torch is not the same everywhere: .* rank 1"):
        start_accelerator(config())


@pytest.mark.usefixtures("fresh_accelerate_state")
@pytest.mark.parametrize(
    ("asked", "made", "problem"),
    [
        (
            TWO | CPU,
            {"num_processes": 1},
            "launch: 2 processes were started, but Accelerate sees 1; launch with a file of "
            "accelerate_configs/",
        ),
        (
            TWO | FSDP,
            {"num_processes": 2, "distributed_type": "MULTI_GPU"},
            "launch: FSDP was asked for, but Accelerate made MULTI_GPU",
        ),
        (
            DEEPSPEED,
            {"num_processes": 1, "distributed_type": "NO"},
            "launch: DEEPSPEED was asked for, but Accelerate made NO",
        ),
    ],
)
def test_what_accelerate_made_must_be_what_was_asked(asked, made, problem, machine, monkeypatch):
    machine(2)
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    made = {"distributed_type": "NO", **made}
    made["distributed_type"] = SimpleNamespace(value=made["distributed_type"])
    monkeypatch.setattr(start, "Accelerator", lambda **_: SimpleNamespace(**made))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    with pytest.raises(SharedError) as refused:
        start_accelerator(config())
    assert refused.value.problems == [problem]


@pytest.mark.usefixtures("fresh_accelerate_state")
def test_one_line_says_what_runs(capsys, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    start_accelerator(config())
    assert capsys.readouterr().err == (
        "running: 1 process on 1 machine, device cpu, precision float32, distributed type NO\n"
    )


@pytest.mark.usefixtures("fresh_accelerate_state")
def test_emulated_bf16_and_idle_cores_are_noted(capsys, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 0)
    monkeypatch.setenv("OMP_NUM_THREADS", "0")
    start_accelerator(config(mixed_precision="bf16"))
    first, *notes = capsys.readouterr().err.splitlines()
    assert "precision bf16" in first
    assert [note.partition(",")[0][:24] for note in notes] == [
        "note: this run uses 0 of",
        "note: bf16 is emulated a",
    ]


def test_processes_with_other_data_are_refused(monkeypatch):
    own = {"base": "sha256:a", "train data": "sha256:b"}
    other = own | {"train data": "sha256:c"}
    monkeypatch.setattr(start, "gather_object", lambda mine: [*mine, other, own, other])
    with pytest.raises(SharedError) as raised:
        start.refuse_unlike(None, own)
    assert raised.value.problems == [
        "launch: train data is not the same on rank 0 and on rank 1, 3; every machine needs the "
        "same files"
    ]
    monkeypatch.setattr(start, "gather_object", lambda mine: mine * 2)
    start.refuse_unlike(None, own)
