"""Trains and evaluates each method with the loop itself, as one process of one or of several.

As a script, `exact_runs.py BASE OUT PART METHOD ...` leaves `OUT/<rank>-of-<processes>.json`. A
base of type llama learns to write: prompts and completions of any length, and the latter's loss.
"""

import json
import os
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import tiny_runs
import torch
from transformers import AutoTokenizer

from peftkit.contracts import Split
from peftkit.memory.meter import MemoryMeter
from peftkit.tasks.completions import encode_pairs
from peftkit.training.config import TrainingConfig
from peftkit.training.evaluation import Evaluator
from peftkit.training.loop import Trainer
from peftkit.training.signals import StopRequest
from peftkit.training.start import start_accelerator
from peftkit.training.state import Job

METHODS = {
    "full": {"type": "full", "layerwise_lr_decay": 0.9},
    "top_layers": {"type": "top_layers", "num_layers": 1},
    "lora": {"type": "lora", "loraplus_lr_ratio": 4.0},
    "qlora": {"type": "qlora"},
}
TASKS = {name: tiny_runs.make_task(name) for name in tiny_runs.SPECS}
"""One of each for all: it learns from the texts that it tokenises how to pad."""
EFFECTIVE_BATCH = 8
STEPS = {"whole": 14, "quick": 7}
COUNTS = {"whole": (1, 2, 15, 16, 17, 97), "quick": (1, 17)}
BATCH_SIZES = {"whole": (1, 4, 7, 32), "quick": (1, 7)}
SIZES = {"whole": (8, 4, 2, 1), "quick": (8, 2)}


def task_name(folder):
    """What the base is for."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    return "sft" if kind == "llama" else "classification"


def texts(folder, count, *, seed=0):
    """Examples of 2 to 12 words, as the task tokenises them; half of those of an sft are asked."""
    tokenizer, rng = AutoTokenizer.from_pretrained(folder), random.Random(seed)
    words = [rng.choices(tiny_runs.WORDS, k=rng.randint(2, 12)) for _ in range(count)]
    if task_name(folder) == "sft":
        rows = completions(tokenizer, words, rng)
    else:
        encoded = TASKS["classification"].encode(tokenizer, [[" ".join(w)] for w in words])
        rows = [{**row, "label": i % 2} for i, row in enumerate(encoded)]
    return Split("train", rows, f"sha256:{'0' * 64}")


def completions(tokenizer, words, rng):
    """Prompts and what follows them; some examples have one learnt token, some a dozen."""
    task = TASKS["sft"]
    seams = [rng.randint(0, len(w)) for w in words]
    pairs = [
        {"prompt": " ".join(w[:seam]), "completion": " " + " ".join(w[seam:])}
        for w, seam in zip(words, seams, strict=True)
    ]
    task.encode(tokenizer, [["the"]])
    task._padding = replace(task._padding, side="right")
    return [{"input_ids": e.ids, "labels": e.labels} for e in encode_pairs(tokenizer, pairs)]


def make_trainer(base, name, folder, **training):
    """A trainer of the tiny base: 53 ragged examples, so that each epoch's last step has 5."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"learning_rate": 1e-3, "num_train_epochs": 2.0, "logging_steps": 1}
    config = TrainingConfig(**settings, **training)
    accelerator = start_accelerator(config)
    method = tiny_runs.make_method(METHODS[name])
    precision = config.mixed_precision or "no"
    task = task_name(base)
    model = tiny_runs.prepare(
        base, method, dropout=config.dropout, mixed_precision=precision, task=task
    )
    job = Job(
        model=model,
        groups=method.parameter_groups(model, config.learning_rate),
        task=TASKS[task],
        train=texts(base, 53),
        holdout=None,
        config=config,
        seed=0,
        folder=folder,
    )
    return Trainer(job, accelerator, MemoryMeter(accelerator.device))


def trained(base, name, folder, **training):
    """Loss and learning rates of every step, and what came out, to the last bit."""
    trainer = make_trainer(base, name, folder, **training)
    losses, rates, exchanged = [], [], []
    real, exchanges = trainer._step, count_exchanges(trainer)

    def watched(batches):
        before = len(exchanges)
        result = real(batches)
        losses.append(result.loss)
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
        exchanged.append(exchanges[before:])
        return result

    trainer._step = watched
    trainer.fit(StopRequest())
    parameters = {n: p for n, p in trainer.job.model.named_parameters() if p.requires_grad}
    return {
        "losses": losses,
        "rates": rates,
        "exchanged": exchanged,
        "trained": {name: p.detach().flatten().tolist() for name, p in parameters.items()},
    }


def count_exchanges(trainer):
    """A list that grows by the number of each bucket of gradients that processes exchange."""
    exchanges = []
    if trainer.accelerator.num_processes > 1:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        def counted(state, bucket):
            exchanges.append(bucket.index())
            return allreduce_hook(state, bucket)

        trainer.model.register_comm_hook(None, counted)
    return exchanges


def evaluated(base, name, folder, part):
    """Loss, each example's own and what it is the mean of, by number of examples and batch size."""
    trainer = make_trainer(base, name, folder)
    found = {}
    for count in COUNTS[part]:
        split = texts(base, count, seed=count)
        for size in BATCH_SIZES[part]:
            evaluator = Evaluator(trainer.accelerator, size)
            result = evaluator.evaluate(trainer.model, trainer.job.task, split)
            losses = result.columns["loss"]
            items = result.columns.get("loss_items", np.ones(count, dtype=int))
            found[f"{count}/{size}"] = {
                "loss": result.metrics["loss"],
                "losses": (losses / items).tolist(),
                "items": items.tolist(),
            }
    return found


def all_of(base, out, name, *, part, processes):
    """Everything of one method: each way to share a step of 8 among so many processes."""
    sizes = [size for size in SIZES[part] if size * processes <= EFFECTIVE_BATCH]
    split = {}
    for size in sizes:
        accumulation = EFFECTIVE_BATCH // (size * processes)
        split[f"{size}x{accumulation}"] = trained(
            base,
            name,
            out / f"{name}-{processes}-{size}",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            dropout=0.0,
            max_steps=STEPS[part],
        )
    return {"trained": split, "evaluated": evaluated(base, name, out / name, part)}


def main():
    base, out, part, *names = sys.argv[1:]
    rank, processes = (int(os.environ.get(key, "0")) for key in ("RANK", "WORLD_SIZE"))
    processes = max(1, processes)
    torch.set_num_threads(1)
    given = {"part": part, "processes": processes}
    found = {name: all_of(Path(base), Path(out), name, **given) for name in names}
    Path(out, f"{rank}-of-{processes}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
