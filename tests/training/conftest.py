"""A task and a model of a few hundred parameters, and a trainer on them."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from peftkit.contracts import ParameterGroup, Split
from peftkit.memory.meter import MemoryMeter
from peftkit.training.config import TrainingConfig
from peftkit.training.loop import Trainer
from peftkit.training.start import start_accelerator
from peftkit.training.state import Job
from peftkit.training.trackers import Trackers


class ToyModel(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.middle = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask):
        mask = attention_mask.unsqueeze(-1).float()
        mean = (self.embedding(input_ids) * mask).sum(1) / mask.sum(1)
        hidden = self.dropout(torch.tanh(self.norm(self.middle(mean))))
        return SimpleNamespace(logits=self.head(hidden))


class ToyTask:
    """Three classes; `script` replaces the metrics of each evaluation in turn."""

    metric_names = ["score"]

    def __init__(self, script=None) -> None:
        self.script, self.evaluations = script, 0

    def collate(self, rows):
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        mask = torch.zeros(len(rows), width, dtype=torch.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
            mask[i, : len(row["input_ids"])] = 1
        labels = torch.tensor([row["label"] for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def loss(self, outputs, labels, *, label_smoothing=0.0):
        return functional.cross_entropy(
            outputs.logits, labels, reduction="sum", label_smoothing=label_smoothing
        )

    def loss_items(self, labels):
        return len(labels)

    def predictions(self, outputs, labels):
        losses = functional.cross_entropy(outputs.logits, labels, reduction="none")
        return {"label": labels, "prediction": outputs.logits.argmax(-1), "loss": losses}

    def metrics(self, columns):
        self.evaluations += 1
        if self.script is not None:
            return {"score": self.script[self.evaluations - 1]}
        return {"score": float(np.mean(columns["label"] == columns["prediction"]))}


def toy_split(count: int, seed: int = 0, name: str = "train") -> Split:
    rng = np.random.default_rng(seed)
    rows = [
        {"input_ids": rng.integers(1, 20, rng.integers(2, 9)).tolist(), "label": int(i % 3)}
        for i in range(count)
    ]
    return Split(name, rows, "sha256:" + "0" * 64)


@pytest.fixture
def toy():
    return SimpleNamespace(Model=ToyModel, Task=ToyTask, split=toy_split)


@pytest.fixture(autouse=True)
def _in_a_fresh_state(fresh_accelerate_state):
    pass


@pytest.fixture
def make_trainer(tmp_path):
    """A trainer on 50 ragged examples: 7 steps an epoch of 8, the last one of 2."""

    def make(
        folder: Path | None = None,
        *,
        task=None,
        model=None,
        examples=50,
        holdout=12,
        conditions=None,
        scaler=None,
        trackers=None,
        **training,
    ) -> Trainer:
        folder = folder or tmp_path
        folder.mkdir(exist_ok=True)
        settings = {"learning_rate": 0.05, "per_device_train_batch_size": 8, "logging_steps": 1}
        config = TrainingConfig(**{**settings, "num_train_epochs": 2.0, **training})
        torch.manual_seed(0)
        model = model or ToyModel(config.dropout or 0.0)
        accelerator = start_accelerator(config)
        accelerator.scaler = scaler or accelerator.scaler
        torch.manual_seed(1)
        job = Job(
            model=model,
            groups=[ParameterGroup(list(model.parameters()), config.learning_rate)],
            task=task or ToyTask(),
            train=toy_split(examples),
            holdout=toy_split(holdout, seed=1, name="holdout") if holdout else None,
            config=config,
            seed=0,
            folder=folder,
            conditions=conditions or {},
            trackers=trackers or Trackers(),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return Trainer(job, accelerator, MemoryMeter(accelerator.device))

    return make


@pytest.fixture
def parameters_of():
    def parameters(trainer) -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in trainer.job.model.named_parameters()}

    return parameters
