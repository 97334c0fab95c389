"""Run folders with records and predictions, made without a run."""

from datetime import UTC, datetime, timedelta

import numpy as np

from peftkit.reporting.predictions import write_predictions
from peftkit.reporting.record import RunRecord, write_record

DIGEST = "sha256:" + "a" * 64
STARTED = datetime(2026, 11, 23, 16, 0, tzinfo=UTC)
MIB = 2**20
TASK = {
    "type": "classification",
    "dataset": "glue",
    "dataset_config": "sst2",
    "validation_split": "validation",
    "metrics": ["accuracy"],
    "holdout_fraction": 0.1,
}
TRAINING = {
    "learning_rate": 1e-4,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 32,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
}
MINUTES = iter(range(0, 10**9, 60))
LABELS = np.random.default_rng(0).integers(2, size=400)


def digest(letter):
    return "sha256:" + letter * 64


def recipe_of(name, **sections):
    task = TASK | sections.get("task", {})
    training = TRAINING | sections.get("training", {})
    method = sections.get("method", {"type": "lora", "r": 8})
    return {
        "name": name,
        "base": {"name": "base"},
        "task": task,
        "method": method,
        "training": training,
    }


def record_of(name="lora", seed=0, *, recipe=None, **changes):
    """A completed record; `changes` are fields of the record."""
    started = STARTED + timedelta(minutes=next(MINUTES))
    fields = {
        "name": name,
        "status": "completed",
        "error": None,
        "recipe": (recipe or recipe_of(name)) | {"seed": seed, "output_dir": "runs"},
        "recipe_digest": DIGEST,
        "seed": seed,
        "metrics": {"validation": {"loss": 0.5, "accuracy": 0.9}},
        "history": [
            {"step": step, "loss": 1 / step, "holdout": {"accuracy": 0.9 - 1 / step}}
            for step in (10, 20, 30)
        ],
        "memory": {
            phase: {
                "allocated_bytes": size * MIB,
                "reserved_bytes": None,
                "resident_bytes": size * 2 * MIB,
            }
            for phase, size in (("load", 90), ("train_step", 500), ("eval", 120))
        },
        "seconds": {"load": 1.0, "tokenise": 2.0, "train": 1800.0, "eval": 1800.0, "metered": 0.5},
        "examples_per_second": 100.0,
        "tokens_per_second": 2345.6,
        "optimizer_steps": 30,
        "trainable_parameters": 340_000,
        "total_parameters": 22_000_000,
        "delta_bytes": 3 * MIB,
        "delta": f"{name}@v1",
        "digests": {
            "base": DIGEST,
            "data_train": DIGEST,
            "data_validation": DIGEST,
            "recipe": DIGEST,
        },
        "learning_rates_tried": [1e-4],
        "libraries": {"torch": "2.13.0"},
        "device": "CPU",
        "processes": 1,
        "mixed_precision": "no",
        "distributed_type": "NO",
        "git_commit": None,
        "git_dirty": None,
        "predictions": None,
        "stand_in": False,
        "origins": {"base": "package", "data": "mirror"},
        "started": started,
        "finished": started + timedelta(minutes=30),
    }
    return RunRecord(**(fields | changes))


def write_run(folder, record, right=None):
    """The run's folder; with `right` (400,), which examples it answers rightly, predictions too."""
    folder.mkdir(parents=True)
    if right is not None:
        answers = np.where(right, LABELS, 1 - LABELS)
        columns = {"label": LABELS, "prediction": answers, "loss": np.where(right, 0.1, 2.0)}
        write_predictions(folder / "predictions.parquet", columns)
        scores = {"validation": {"accuracy": float(np.mean(right))}}
        changes = {"metrics": scores, "predictions": "predictions.parquet"}
        record = record.model_copy(update=changes)
    write_record(folder / "record.json", record)
    return folder


def right_share(share, seed):
    """Which of the 400 examples are right: about `share`, the hard ones the same for all."""
    rng = np.random.default_rng([1, seed])
    hardness = np.random.default_rng(2).normal(size=len(LABELS))
    noisy = hardness + rng.normal(scale=0.4, size=len(LABELS))
    return noisy < np.quantile(hardness, share) * np.sqrt(1 + 0.4**2)


def write_arm(root, name, share, *, seeds=(0, 1, 2), recipe=None, **changes):
    """One arm: a run a seed, whose answers are right to about `share`."""
    for seed in seeds:
        own = right_share(share, 100 * sum(map(ord, name)) + seed)
        write_run(root / f"{name}-seed{seed}", record_of(name, seed, recipe=recipe, **changes), own)
