"""The check `precision` of `gpu_check`: what may not change a loss, and by how much it does.

A small Llama of random weights takes eight steps of 8 examples of ragged lengths, without dropout,
under each precision: as one batch, as 4×2, 2×4 and 1×8 micro-batches, and with activations
recomputed. The yardstick is the same run on the CPU in float32. Bounds: float32 as promised for any
device, but for the CPU against the GPU, which sum in other orders; 16 bits by their spacing. The
yardstick for QLoRA in 16 bits is only written down: from rounded weights other 4-bit codes follow.
"""

import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from planner_accuracy import METHODS, VOCABULARY, Where, setting_of, trained
from transformers import AutoModelForSequenceClassification

from peftkit.contracts import Split
from peftkit.planning.setting import Shape

STEPS, EXAMPLES = 8, 8
PROCESSES = 6
SPLITS = (4, 2, 1)
"""Examples of a micro-batch; the step keeps its eight."""
BOUNDS: dict[str, dict[str, float]] = {
    "no": {"splits": 5e-6, "recomputation": 1e-6, "cpu_float32": 1e-4},
    "bf16": {"splits": 2e-2, "recomputation": 1e-6, "cpu_float32": 2e-2},
    "fp16": {"splits": 3e-3, "recomputation": 1e-6, "cpu_float32": 3e-3},
}


def check() -> dict[str, Any]:
    """Largest difference of a step's loss, by precision and method, with the bounds."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        torch.manual_seed(0)
        config = Where().config("llama")
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
            cases = [(folder, method, name) for name in BOUNDS for method in METHODS]
            rows = list(pool.map(_row, *zip(*cases, strict=True)))
    return {"bounds": BOUNDS, "all_within_bounds": all(map(_within, rows)), "rows": rows}


def _within(row: dict[str, Any]) -> bool:
    bounds = BOUNDS[row["precision"]]
    return all(row[name] <= bounds[name] for name in bounds if name not in row["without_bound"])


def _row(folder: Path, method: str, precision: str) -> dict[str, Any]:
    where = Where("cuda", precision)
    whole = _losses(folder, method, where)
    splits = [_losses(folder, method, where, examples=size) for size in SPLITS]
    rounded = method == "qlora" and precision != "no"
    return {
        "precision": precision,
        "method": method,
        "without_bound": ["cpu_float32"] if rounded else [],
        "splits": max(_difference(whole, other) for other in splits),
        "recomputation": _difference(whole, _losses(folder, method, where, checkpointing=True)),
        "cpu_float32": _difference(whole, _losses(folder, method, Where())),
    }


def _losses(
    folder: Path,
    method: str,
    where: Where,
    *,
    examples: int = EXAMPLES,
    checkpointing: bool = False,
) -> list[float]:
    """Loss of each step; the batches and the initial weights are always the same."""
    shape = Shape(examples, 64)
    setting = setting_of(folder, method, shape, where, checkpointing=checkpointing)
    training = setting.training.model_copy(
        update={"gradient_accumulation_steps": EXAMPLES // examples, "dropout": 0.0}
    )
    torch.manual_seed(1)
    trainer, _ = trained(folder, replace(setting, training=training), _ragged())
    return trainer.state.losses


def _ragged() -> Split:
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(STEPS * EXAMPLES):
        length = int(torch.randint(3, 64, (), generator=generator))
        ids = torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "attention_mask": [1] * length, "label": i % 2})
    return Split("train", made, "sha256:" + "0" * 64)


def _difference(one: list[float], other: list[float]) -> float:
    assert len(one) == len(other) == STEPS
    return max(abs(a - b) for a, b in zip(one, other, strict=True))
