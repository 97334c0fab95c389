"""A Markdown table of finished runs: score over seeds, its interval, memory and time.

Reads `record.json` and `predictions.parquet` of run folders. Runs that differ in more than the
seed are different rows.

    python benchmarks/score_table.py runs/lora_sst2-seed* runs/full_sst2-seed*

The interval is that of the mean over seeds under another draw of validation examples: a percentile
bootstrap of the examples, which all seeds share. It says nothing of more seeds; the range does.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from sklearn.metrics import accuracy_score, matthews_corrcoef

METRICS = {"accuracy": accuracy_score, "matthews_correlation": matthews_corrcoef}
RESAMPLES = 2000
COLUMNS = ("run", "rate", "seeds", "score", "range", "95% interval", "MiB", "train s")


def answers(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels and predictions of one run, each (examples,)."""
    table = pq.read_table(folder / "predictions.parquet", columns=["label", "prediction"])
    return table["label"].to_numpy(), table["prediction"].to_numpy()


def resampled(folders: list[Path], metric: Callable) -> list[float]:
    """Mean over the runs of the metric, on each of `RESAMPLES` draws of the examples."""
    runs = [answers(folder) for folder in folders]
    count, rng = len(runs[0][0]), np.random.default_rng(0)
    draws = (rng.integers(0, count, count) for _ in range(RESAMPLES))
    return [
        np.mean([metric(label[rows], prediction[rows]) for label, prediction in runs])
        for rows in draws
    ]


def line(folders: list[Path]) -> list[str]:
    """Cells of one row."""
    records = [json.loads((folder / "record.json").read_text()) for folder in folders]
    if unfinished := [r["name"] for r in records if r["status"] != "completed"]:
        raise SystemExit(f"not completed: {', '.join(unfinished)}")
    recipe = records[0]["recipe"]
    metric = recipe["task"]["metrics"][0]
    each = np.array([r["metrics"]["validation"][metric] for r in records])
    low, high = np.percentile(resampled(folders, METRICS[metric]), [2.5, 97.5])
    peak = max(r["memory"]["train_step"]["allocated_bytes"] for r in records) / 2**20
    seconds = np.mean([r["seconds"]["train"] for r in records])
    return [
        records[0]["name"],
        f"{recipe['training']['learning_rate']:g}",
        ", ".join(str(r["seed"]) for r in records),
        f"{each.mean():.4f}",
        f"{each.min():.4f} to {each.max():.4f}",
        f"{low:.3f} to {high:.3f}",
        f"{peak:.0f}",
        f"{seconds:.0f}",
    ]


def main() -> None:
    """Group the folders by all but their seed; print one line a group."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    groups = defaultdict(list)
    for folder in sorted(parser.parse_args().folders):
        recipe = json.loads((folder / "record.json").read_text())["recipe"]
        groups[json.dumps(recipe | {"seed": None, "output_dir": None})].append(folder)
    print(f"| {' | '.join(COLUMNS)} |")
    print(f"|{'---|' * len(COLUMNS)}")
    for folders in groups.values():
        print(f"| {' | '.join(line(folders))} |")


if __name__ == "__main__":
    main()
