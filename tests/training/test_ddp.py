"""DDP with frozen layers and heads: no search for unused parameters, one exchange a step."""

import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import ddp_runs
import pytest
import torch
from accelerate import Accelerator
from ddp_runs import METHODS, MICRO_BATCHES, STEPS

ROOT = Path(__file__).parents[2]


def launched(rank, processes):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
    return {k: str(v) for k, v in numbers.items()} | {
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def one_process_of_gloo(monkeypatch, fresh_accelerate_state):
    """DDP as it is among several, in this process alone."""
    for name, value in launched(0, 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Accelerator, "use_distributed", True)  # it is not said of one process
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_exchanged_at_the_last_micro_step_only(
    method, one_process_of_gloo, tiny_base, tmp_path
):
    found = ddp_runs.fit(tiny_base, METHODS[method], tmp_path / "run")
    assert not found["looks_for_unused"]
    assert found["exchanges"] == STEPS


def test_an_exchange_in_every_micro_step_would_be_counted(
    one_process_of_gloo, tiny_base, tmp_path, monkeypatch
):
    monkeypatch.setattr(Accelerator, "no_sync", lambda *_: nullcontext())
    found = ddp_runs.fit(tiny_base, METHODS["full"], tmp_path / "run")
    assert found["exchanges"] == STEPS * MICRO_BATCHES


@pytest.mark.slow
def test_two_processes_train_the_same_weights_by_every_method(tiny_base, tmp_path):
    environment = launched(0, 2)
    path = {"PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(ddp_runs.__file__), str(tiny_base), str(tmp_path)],
            env={**os.environ, **environment, **path, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in ("0", "1")
    ]
    said = [process.communicate(timeout=600)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    first, second = (torch.load(tmp_path / f"rank-{r}.pt", weights_only=True) for r in (0, 1))
    for method in METHODS:
        ours, theirs = first[method], second[method]
        assert (ours["looks_for_unused"], ours["exchanges"]) == (False, STEPS)
        assert ours["trained"].keys() == theirs["trained"].keys()
        assert all(torch.equal(ours["trained"][n], theirs["trained"][n]) for n in ours["trained"])
