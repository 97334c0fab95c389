"""Evaluation: each example once, weighted alike, whatever the batches and processes."""

import random

import numpy as np
import pytest
import torch
from torch.nn import functional

from peftkit.data.batching import evaluation_batches
from peftkit.memory.meter import MemoryMeter
from peftkit.training import evaluation
from peftkit.training.config import TrainingConfig
from peftkit.training.evaluation import Evaluator
from peftkit.training.start import start_accelerator


@pytest.fixture
def accelerator():
    return start_accelerator(TrainingConfig(learning_rate=1.0))


@pytest.fixture
def model(toy):
    torch.manual_seed(0)
    return toy.Model(dropout=0.5)


def generators():
    numpy = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), numpy[2:]


def plain_losses(model, task, split):
    model.eval()
    losses = []
    for row in split.rows:
        batch = task.collate([row])
        labels = batch.pop("labels")
        with torch.no_grad():
            losses.append(functional.cross_entropy(model(**batch).logits, labels).item())
    return losses


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 97])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 32])
def test_each_example_counts_once_and_alike(accelerator, model, toy, count, batch_size):
    task, split = toy.Task(), toy.split(count)
    result = Evaluator(accelerator, batch_size).evaluate(model, task, split)
    expected = plain_losses(model, task, split)
    assert result.columns["label"].tolist() == [row["label"] for row in split.rows]
    assert np.abs(result.columns["loss"] - expected).max() <= 1e-6
    assert abs(result.metrics["loss"] - np.mean(expected)) <= 1e-6
    hits = result.columns["label"] == result.columns["prediction"]
    assert result.metrics["score"] == np.mean(hits)


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("count", [1, 16, 17])
def test_processes_together_see_each_example_once(
    accelerator, model, toy, monkeypatch, processes, count
):
    """Each rank's part is made in turn, and gathered by hand."""
    task, split, parts = toy.Task(), toy.split(count), []
    kind = type(accelerator)
    monkeypatch.setattr(kind, "num_processes", processes)
    evaluator = Evaluator(accelerator, 4)
    for rank in range(processes):
        monkeypatch.setattr(kind, "process_index", rank)
        parts += evaluator._forward(model, task, split)
    monkeypatch.setattr(evaluation, "gather_object", lambda own: parts)
    result = evaluator.evaluate(model, task, split)
    assert np.abs(result.columns["loss"] - plain_losses(model, task, split)).max() <= 1e-6


@pytest.mark.parametrize("fault", ["lost", "twice"])
def test_an_example_lost_or_counted_twice_is_noticed(accelerator, model, toy, monkeypatch, fault):
    def faulty(lengths, size):
        batches = evaluation_batches(lengths, size)
        return batches[:-1] if fault == "lost" else [*batches, batches[0]]

    monkeypatch.setattr(evaluation, "evaluation_batches", faulty)
    with pytest.raises(AssertionError, match=r"^an example was lost or counted twice"):
        Evaluator(accelerator, 4).evaluate(model, toy.Task(), toy.split(9))


def test_evaluation_leaves_the_random_numbers_and_the_parameters_alone(accelerator, model, toy):
    class Drawing(toy.Task):
        """As a bootstrap does it, or the first import of scikit-learn."""

        def metrics(self, columns):
            torch.rand(1), random.random(), np.random.rand()
            return super().metrics(columns)

    before, state = [p.clone() for p in model.parameters()], generators()
    Evaluator(accelerator, 4).evaluate(model, Drawing(), toy.split(9))
    assert generators() == state
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_only_the_longest_batch_is_probed_and_its_time_left_out(accelerator, model, toy):
    probed = []

    class Meter(MemoryMeter):
        def probe(self, roots):
            probed.append(list(roots))
            self.overhead_seconds += 100.0
            return super().probe(roots)

    meter = Meter(torch.device("cpu"))
    result = Evaluator(accelerator, 4, meter).evaluate(model, toy.Task(), toy.split(17))
    assert probed == [[model]]
    assert result.seconds < 0
    assert meter.result()["eval"].allocated_bytes > 0
