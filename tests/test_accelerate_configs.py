"""Each file of `accelerate_configs/` says to Accelerate and to peftkit what its name says."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)

from peftkit.cli import main
from peftkit.reporting.record import read_record
from peftkit.training.config import TrainingConfig
from peftkit.training.launched import launch_problems, read_launch

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "accelerate_configs"
SHARDED = ("fsdp2", "fsdp2_qlora", "fsdp2_offload")
ZERO = {"zero2": 2, "zero3": 3}
SAYS = {
    "cpu": ("NO", 1, 1, "no"),
    "cpu_ddp": ("MULTI_GPU", 2, 1, "no"),
    "gpu_bf16": ("NO", 1, 1, "bf16"),
    "gpu_fp16": ("NO", 1, 1, "fp16"),
    "ddp": ("MULTI_GPU", 8, 1, "bf16"),
    "ddp_multi_node": ("MULTI_GPU", 16, 2, "bf16"),
    **dict.fromkeys(SHARDED, ("FSDP", 8, 1, "bf16")),
    **dict.fromkeys(ZERO, ("DEEPSPEED", 8, 1, "bf16")),
}
"""Distributed type, processes, machines, precision."""


def path_of(name):
    return FOLDER / f"{name}.yaml"


def command_of(name):
    """The words of the command in a file's header, and the variables before them."""
    lines = [line[1:].strip() for line in path_of(name).read_text().splitlines() if line[:1] == "#"]
    start = max(i for i, line in enumerate(lines) if "accelerate launch" in line)
    words = shlex.split(" ".join(lines[start:]).replace("\\", ""))
    begin = words.index("accelerate")
    return dict(word.split("=", 1) for word in words[:begin]), words[begin:]


def launched_environment(name, monkeypatch):
    """What a process of the run finds in its environment, by Accelerate's own launcher.

    torchrun's own variables are added for the launchers that go through it.
    """
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda _: False)
    variables, words = command_of(name)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(words[2:]))
    if SAYS[name][0] == "NO":
        return prepare_simple_launcher_cmd_env(arguments)[1]
    if SAYS[name][0] == "DEEPSPEED":
        arguments.deepspeed_fields_from_accelerate_config = ""
        environment = prepare_deepspeed_cmd_env(arguments)[1]
    else:
        environment = prepare_multi_gpu_env(arguments)
    here = str(arguments.nproc_per_node)
    processes = str(arguments.num_processes)
    return environment | {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": here, "LOCAL_RANK": "0"}


def test_the_table_has_every_file():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == SAYS.keys()


@pytest.mark.parametrize("name", SAYS)
def test_accelerate_reads_what_the_name_says(name):
    read = load_config_from_file(str(path_of(name)))
    found = (read.distributed_type.value, read.num_processes, read.num_machines)
    assert (*found, read.mixed_precision) == SAYS[name]
    assert read.use_cpu is name.startswith("cpu")


@pytest.mark.parametrize("name", SAYS)
def test_the_header_has_a_reason_and_a_command_for_this_file(name):
    header = path_of(name).read_text().partition("compute_environment")[0]
    assert len(header.splitlines()) >= 3
    _, words = command_of(name)
    assert words[:4] == ["accelerate", "launch", "--config_file", f"accelerate_configs/{name}.yaml"]
    recipe = words[-1]
    assert words[-2:] == ["peftkit/run.py", recipe]
    assert (ROOT / recipe).is_file()


@pytest.mark.parametrize("name", SAYS)
def test_the_command_reaches_the_run_as_what_was_asked(name, monkeypatch):
    """On a machine that has the hardware, nothing stands against it; elsewhere something does."""
    environment = launched_environment(name, monkeypatch)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    if name in ZERO:
        monkeypatch.setattr("importlib.util.find_spec", lambda _: object())

    def problems(gpus):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: gpus)
        return launch_problems(read_launch(TrainingConfig(learning_rate=1.0)))

    asked = read_launch(TrainingConfig(learning_rate=1.0))
    kind, processes, machines, precision = SAYS[name]
    assert asked.strategy == (kind if kind in ("FSDP", "DEEPSPEED") else None)
    assert (asked.processes, asked.here) == (processes, processes // machines)
    assert (asked.cpu, asked.precision) == (name.startswith("cpu"), precision)
    assert problems(8) == []
    assert len(problems(0)) == (0 if name.startswith("cpu") else 1)


def test_without_its_variable_the_cpu_config_takes_no_gpu(monkeypatch):
    environment = launched_environment("cpu_ddp", monkeypatch)
    assert environment["CUDA_VISIBLE_DEVICES"] == "-1,-1"


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_configs_make_the_fsdp2_that_peftkit_needs(name, monkeypatch):
    for variable, value in launched_environment(name, monkeypatch).items():
        monkeypatch.setenv(variable, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.transformer_cls_names_to_wrap is None  # the model's own blocks
    assert plugin.reshard_after_forward is True
    assert not plugin.cpu_ram_efficient_loading
    assert not plugin.activation_checkpointing
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    offloads = type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy"
    assert offloads is (name == "fsdp2_offload")


@pytest.mark.parametrize("name", ZERO)
def test_zero_configs_make_their_stage(name, monkeypatch):
    for variable, value in launched_environment(name, monkeypatch).items():
        monkeypatch.setenv(variable, value)
    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == ZERO[name]
    assert (plugin.offload_optimizer_device, plugin.offload_param_device) == ("none", "none")
    assert plugin.zero3_init_flag is False


@pytest.fixture
def recipe(tiny_recipe, workplace, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    tiny_recipe["training"] |= {"max_steps": 2}
    file = workplace / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_recipe))
    return file


def assert_ran(processes, kind, said):
    record = read_record(Path("runs/tiny-seed0/record.json"))
    assert record.status == "completed"
    assert (record.processes, record.distributed_type) == (processes, kind)
    word = "process" if processes == 1 else "processes"
    assert (
        f"running: {processes} {word} on 1 machine, device cpu, precision float32, "
        f"distributed type {kind}\n"
    ) in said


@pytest.mark.slow
def test_the_config_of_processes_on_the_cpu_runs_by_the_verb(recipe, capfd):
    """`peftkit run` sets the variable that the file needs."""
    file = str(path_of("cpu_ddp"))
    assert main(["run", str(recipe), "--", "--config_file", file, "--main_process_port", "0"]) == 0
    assert_ran(2, "MULTI_CPU", capfd.readouterr().err)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ran"), [("cpu", (1, "NO")), ("cpu_ddp", (2, "MULTI_CPU"))])
def test_the_command_of_the_header_runs(name, ran, recipe):
    variables, words = command_of(name)
    words[words.index("--config_file") + 1] = str(path_of(name))
    words[-2:] = [str(ROOT / "peftkit" / "run.py"), str(recipe)]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *words[2:]],
        env={**os.environ, **variables, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert_ran(*ran, done.stderr)


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="the machine has the hardware")
@pytest.mark.parametrize(
    ("name", "processes", "said"),
    [
        ("ddp", 2, "launch: 2 processes were started for GPUs, and this machine has none; "),
        ("fsdp2", 2, "launch: FSDP is asked for and needs GPUs; "),
        ("gpu_bf16", 1, "launch: mixed precision bf16 was launched without naming the CPU, "),
        ("gpu_fp16", 1, "launch: mixed precision fp16 needs a GPU, and this run is on the CPU; "),
    ],
)
def test_absent_hardware_is_one_line_from_one_process(name, processes, said, recipe, capfd):
    extra = ["--config_file", str(path_of(name)), "--num_processes", str(processes)]
    assert main(["run", str(recipe), "--", *extra, "--main_process_port", "0"]) == 1
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(said)
    assert not Path("runs").exists()
