"""A process of a run fails: it is said once, and the record says of what."""

import os
from pathlib import Path

import pytest
import yaml

from peftkit.cli import main
from peftkit.reporting.record import read_record

ROOT = Path(__file__).parents[2]
FAILING = """
import os
if os.environ.get("RANK") == "1":
    from peftkit.training.loop import Trainer

    def fail(self, batches):
        raise {error}

    Trainer._step = fail
"""
ADVICE = "out of memory; halve training.per_device_train_batch_size (8) and double "
OTHER = "RuntimeError: odd"


@pytest.fixture
def run_both(tiny_recipe, workplace, monkeypatch, capfd):
    """Exit code, lines of stderr after those of the start, and the record, of two processes."""
    Path("tiny.yaml").write_text(yaml.safe_dump(tiny_recipe))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(workplace), str(ROOT)]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run_both(*overrides, error=None):
        if error:
            Path("sitecustomize.py").write_text(FAILING.format(error=error))
        code = main(["run", "tiny.yaml", *overrides, "--nproc", "2"])
        said = capfd.readouterr().err.splitlines()
        start = ("running: ", "base: ", "data: ", "training ")
        rest = [line for line in said if not line.startswith(start)]
        return code, rest, read_record(Path("runs/tiny-seed0/record.json"))

    return run_both


@pytest.mark.slow
def test_what_both_meet_is_said_by_the_first(run_both):
    code, said, record = run_both("method={type: top_layers, num_layers: 9}")
    assert code == 1
    assert len(said) == 1
    assert said[0].startswith("method: num_layers is 9, ")
    assert (record.status, record.error) == ("failed", said[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "status", "reason", "line"),
    [
        ("MemoryError", "out_of_memory", "MemoryError", ADVICE),
        ("RuntimeError('odd')", "failed", OTHER, OTHER),
    ],
)
def test_what_the_second_alone_meets_is_said_by_it_and_recorded(
    run_both, error, status, reason, line
):
    code, said, record = run_both(error=error)
    assert code == 1
    assert len(said) == 1
    assert said[0].startswith(f"rank 1: {line}")
    assert (record.status, record.error) == (status, f"rank 1: {reason}")
