"""A few steps of the loop under DDP, with every exchange of gradients counted.

Run as a script it is one of several processes: `python ddp_runs.py BASE FOLDER`; each writes what
it found for all methods to `FOLDER/rank-N.pt`.
"""

import os
import random
import sys
from pathlib import Path

import torch
from tiny_runs import WORDS, make_method, make_task, prepare
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoTokenizer

from peftkit.contracts import Split
from peftkit.memory.meter import MemoryMeter
from peftkit.modeling.parameters import trainable_parameters
from peftkit.training.config import TrainingConfig
from peftkit.training.loop import Trainer
from peftkit.training.signals import StopRequest
from peftkit.training.start import start_accelerator
from peftkit.training.state import Job

METHODS = {
    "full": {"type": "full"},
    "top_layers": {"type": "top_layers", "num_layers": 1},
    "lora": {"type": "lora", "lora_dropout": 0.0},
    "qlora": {"type": "qlora", "lora_dropout": 0.0},
}
MICRO_BATCHES = 3
STEPS = 4


def make_split(task, base, examples):
    tokenizer = AutoTokenizer.from_pretrained(base)
    rng = random.Random(0)
    texts = [[" ".join(rng.choices(WORDS, k=rng.randint(2, 9)))] for _ in range(examples)]
    rows = [{**row, "label": i % 2} for i, row in enumerate(task.encode(tokenizer, texts))]
    return Split("train", rows, f"sha256:{'0' * 64}")


def fit(base, section, folder):
    """Train by one method for `STEPS` steps of `MICRO_BATCHES` micro-batches a process.

    Returns:
        Whether the model is DDP's and looks for unused parameters, the number of gradient
        exchanges, and the trained parameters.
    """
    folder.mkdir(parents=True)
    config = TrainingConfig(
        learning_rate=0.05,
        num_train_epochs=1.0,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=MICRO_BATCHES,
        save_steps=1000,
        optimizer="sgd",
    )
    accelerator, method = start_accelerator(config), make_method(section)
    model, task = prepare(base, method, dropout=0.0), make_task()
    job = Job(
        model=model,
        groups=method.parameter_groups(model, config.learning_rate),
        task=task,
        train=make_split(task, base, 2 * MICRO_BATCHES * STEPS * accelerator.num_processes),
        holdout=None,
        config=config,
        seed=0,
        folder=folder,
    )
    trainer = Trainer(job, accelerator, MemoryMeter(accelerator.device))
    exchanges = []

    def counted(state, bucket):
        exchanges.append(bucket.is_last())
        return allreduce_hook(state, bucket)

    assert isinstance(trainer.model, DistributedDataParallel)
    trainer.model.register_comm_hook(None, counted)
    assert trainer.fit(StopRequest()).step == STEPS
    return {
        "looks_for_unused": trainer.model.find_unused_parameters,
        "exchanges": sum(exchanges),
        "trained": {n: p.detach().clone() for n, p in trainable_parameters(model).items()},
    }


if __name__ == "__main__":
    base, folder = map(Path, sys.argv[1:])
    rank = os.environ["RANK"]
    found = {name: fit(base, METHODS[name], folder / f"{name}-{rank}") for name in METHODS}
    torch.save(found, folder / f"rank-{rank}.pt")
    torch.distributed.destroy_process_group()
