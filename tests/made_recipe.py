"""A recipe for a tiny base and tiny data."""

from pathlib import Path


def made_recipe(base: Path, data: Path) -> dict:
    """A resolved recipe as a dict, to be changed by a test and validated."""
    return {
        "name": "tiny",
        "base": {"name": str(base)},
        "task": {
            "type": "classification",
            "dataset": str(data),
            "text_columns": ["sentence"],
            "labels": ["negative", "positive"],
            "metrics": ["accuracy"],
            "holdout_fraction": 0.1,
            "max_length": 64,
        },
        "method": {"type": "full"},
        "training": {
            "learning_rate": 5e-3,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 8,
        },
    }
