"""A process of a run dies: the others end soon, with the reason, and nothing is left running."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from peftkit.reporting.record import read_record

ROOT = Path(__file__).parents[2]
LOG = Path("runs/tiny-seed0/log.jsonl")
MAX_SECONDS = 60
KILLED = "killed by SIGKILL, most often for lack of memory; the other processes were stopped"


@pytest.fixture
def running(tiny_recipe, workplace):
    """A launcher whose two processes train, and those processes by rank."""
    tiny_recipe["training"] |= {"num_train_epochs": 4000.0, "logging_steps": 1}
    Path("tiny.yaml").write_text(yaml.safe_dump(tiny_recipe))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen(
        [sys.executable, "-m", "peftkit", "run", "tiny.yaml", "--nproc", "2"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not LOG.exists():
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.1)
    everyone = psutil.Process(launcher.pid).children(recursive=True)
    ranks = {int(p.environ()["RANK"]): p for p in everyone if "RANK" in p.environ()}
    assert ranks.keys() == {0, 1}
    yield launcher, everyone, ranks
    for process in everyone:
        if process.is_running():
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_stop_with_the_reason_and_leave_no_orphan(victim, running):
    launcher, everyone, ranks = running
    before = time.monotonic()
    ranks[victim].send_signal(signal.SIGKILL)
    said = launcher.communicate(timeout=MAX_SECONDS)[1].splitlines()
    assert time.monotonic() - before < MAX_SECONDS
    assert launcher.returncode == 1
    assert not [p for p in everyone if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    lost = "another process of this run ended or cannot be reached any more; "
    if victim == 1:
        assert said[-1] == f"rank 1: {KILLED}"
        assert said[-2].startswith(lost)
        record = read_record(LOG.with_name("record.json"))
        assert record.status == "failed"
        assert record.error.startswith(lost)
    else:
        assert said[-1].startswith("the run ended without a result: SIGKILL killed it, ")
