"""Parameters shared out over two processes: training, deltas and checkpoints as with whole ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from peftkit.registry import Registry

pytestmark = pytest.mark.slow

DEEPSPEED = Path(sys.prefix) / "deepspeed"
"""Where `make slow` puts it: were it on the path of all tests, each run would import it."""
SCRIPT = Path(__file__).with_name("sharded_run.py")
METHODS = {
    "full": {"type": "full"},
    "top_layers": {"type": "top_layers", "num_layers": 1},
    "lora": {"type": "lora", "r": 2, "lora_alpha": 4, "target_modules": "all-linear"},
    "qlora": {"type": "qlora", "r": 2, "lora_alpha": 4, "target_modules": "all-linear"},
}
HOW = ["fsdp2", "zero2", "zero3"]
OURS = 1e-5
"""Largest difference that other orders of summation may make over a run's steps."""


def write_recipe(folder, recipe, **training):
    path = folder / "recipe.yaml"
    recipe["training"] |= {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 7,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "max_steps": 6,
        "eval_steps": 3,
        "save_steps": 3,
        **training,
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


def run(processes, folder, *words, how="fsdp2"):
    launched = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), str(SCRIPT), how]
    plain = ["-m", "peftkit", "run"]
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "DS_ACCELERATOR": "cpu",
        "PEFTKIT_REGISTRY": str(folder / "registry"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent.parent), str(DEEPSPEED)]),
    }
    ended = subprocess.run(
        [sys.executable, *(launched if processes > 1 else plain), *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr


def outcome(folder):
    """Loss of each step, the record, and the tensors of the delta."""
    record = json.loads((folder / "runs/tiny-seed0/record.json").read_text())
    rows = [json.loads(s) for s in (folder / "runs/tiny-seed0/log.jsonl").read_text().splitlines()]
    registry = Registry(folder / "registry")
    delta = registry.read_delta(registry.find("tiny"))
    return {row["step"]: row["loss"] for row in rows if "loss" in row}, record, delta


@pytest.fixture(params=HOW)
def how(request):
    if request.param != "fsdp2" and not DEEPSPEED.exists():
        pytest.skip("DeepSpeed is not there; `make slow` installs it for this test")
    return request.param


@pytest.mark.parametrize("method", METHODS)
def test_a_sharded_run_is_the_same_run(how, method, tiny_recipe, tmp_path):
    if (how, method) == ("zero3", "qlora"):
        pytest.skip("refused: a base in 4 bits cannot be shared out by ZeRO-3")
    tiny_recipe["method"] = METHODS[method]
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        own = {"per_device_train_batch_size": 4 // processes, "dropout": 0.0}
        run(processes, folder, str(write_recipe(folder, tiny_recipe, **own)), how=how)
        found.append(outcome(folder))
    (losses, record, delta), (other_losses, other_record, other_delta) = found
    assert other_record["processes"] == 2
    assert max(abs(losses[step] - other_losses[step]) for step in losses) <= OURS
    assert other_delta.tensors.keys() == delta.tensors.keys()
    for name, tensor in delta.tensors.items():
        assert torch.allclose(other_delta.tensors[name], tensor, rtol=0, atol=OURS), name
    for name, value in record["metrics"]["validation"].items():
        assert other_record["metrics"]["validation"][name] == pytest.approx(value, abs=OURS)


def test_a_sharded_run_is_resumed_to_the_same_end(how, tiny_recipe, tmp_path):
    tiny_recipe["method"] = METHODS["lora"] | {"lora_dropout": 0.1}
    deltas = []
    for name in ("alone", "stopped"):
        folder = tmp_path / name
        folder.mkdir()
        recipe = write_recipe(folder, tiny_recipe)
        if name == "stopped":
            with pytest.raises(AssertionError):
                run(2, folder, str(recipe), "--stop-after=4", how=how)
            run(2, folder, str(recipe), "--resume", how=how)
        else:
            run(2, folder, str(recipe), how=how)
        deltas.append(outcome(folder))
    (losses, _, delta), (other_losses, other_record, other_delta) = deltas
    assert other_record["resumed_after_step"] == 3
    assert losses == other_losses
    for name, tensor in delta.tensors.items():
        assert torch.equal(other_delta.tensors[name], tensor), name
