"""The check `large` of `gpu_check`: large Llamas of random weights, trained for a few steps.

The weights are written to a folder once and read by each method as any base would be. A GPU's
matrix rate is that of one large bf16 product here; a training step's is the operations that its
tokens need over its time, without attention's own and without what is computed twice.
"""

import json
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from planner_accuracy import Where, rows, setting_of, trained
from torch import nn
from transformers import AutoModelForSequenceClassification, LlamaConfig

from peftkit.modeling.parameters import elements
from peftkit.planning.predict import predict
from peftkit.planning.setting import Shape

SHAPE = Shape(8, 512)
STEPS = 12
COMMON = {"vocab_size": 128256, "pad_token_id": 0, "max_position_embeddings": 8192}
MODELS: dict[str, dict[str, int]] = {
    "8B": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
    },
    "1B": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
    },
}
CASES = (("8B", "lora"), ("8B", "qlora"), ("8B", "top_layers"), ("1B", "full"))
MEMORY_FOLDER = Path("/dev/shm")


def check() -> dict[str, Any]:
    """Each case with its peaks, speed and share of the matrix rate."""
    spawn = get_context("spawn")
    with tempfile.TemporaryDirectory(dir=_roomy()) as work:
        for name in MODELS:
            _write_config(Path(work) / name, name)
        with ProcessPoolExecutor(len(CASES), mp_context=spawn) as pool:
            predictions = [pool.submit(_predicted, work, *case) for case in CASES]
            for name in MODELS:
                _write_weights(Path(work) / name)
            predicted = [future.result() for future in predictions]
        rate, rows = matrix_rate(), []
        with ExitStack() as stack:  # all import at once, and then take turns
            pools = [ProcessPoolExecutor(1, mp_context=spawn) for _ in CASES]
            started = [stack.enter_context(pool).submit(_import) for pool in pools]
            for future in started:
                future.result()
            for pool, case, peaks in zip(pools, CASES, predicted, strict=True):
                rows.append(pool.submit(_case, work, *case, peaks, rate).result())
                pool.shutdown()
                print(json.dumps(rows[-1]), flush=True)
    return {"matrix_flops_per_second": rate, "shape": vars(SHAPE), "cases": rows}


def matrix_rate() -> float:
    """Operations a second of one 8192³ bf16 product on random data, the best of several."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    best = float("inf")
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / 1000)
    return 2 * 8192**3 / best


def _import() -> None:
    """Nothing: the imports are what takes its time."""


def _roomy() -> Path | None:
    return MEMORY_FOLDER if MEMORY_FOLDER.is_dir() else None


def _write_config(folder: Path, name: str) -> None:
    LlamaConfig(**COMMON, **MODELS[name]).save_pretrained(folder)


def _write_weights(folder: Path) -> None:
    config = LlamaConfig.from_pretrained(folder)
    torch.manual_seed(0)
    with torch.device("cuda"):
        made = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)
    made.model.save_pretrained(folder)
    del made
    torch.cuda.empty_cache()


def _setting(work: str, model: str, method: str) -> Any:
    where = Where("cuda", "bf16")
    return setting_of(Path(work) / model, method, SHAPE, where, checkpointing=False)


def _predicted(work: str, model: str, method: str) -> dict[str, int]:
    torch.set_num_threads(1)
    return predict(_setting(work, model, method)).by_record_phase()


def _case(
    work: str, model: str, method: str, predicted: dict[str, int], rate: float
) -> dict[str, Any]:
    setting = _setting(work, model, method)
    started = time.perf_counter()
    train = rows(STEPS * SHAPE.examples, SHAPE.tokens)
    trainer, meter = trained(Path(work) / model, setting, train)
    seconds = time.perf_counter() - started
    state = trainer.state
    per_second = state.tokens / state.train_seconds
    row: dict[str, Any] = {"model": model, "method": method, "seconds": round(seconds, 1)}
    row |= {"tokens_per_second": round(per_second), "losses": state.losses}
    row["share_of_matrix_rate"] = per_second * _operations(trainer.model, method) / rate
    for phase, peak in meter.result().items():
        row[f"{phase}_measured"] = peak.allocated_bytes
        row[f"{phase}_reserved"] = peak.reserved_bytes
        row[f"{phase}_predicted"] = predicted[phase]
        row[f"{phase}_error"] = predicted[phase] / (peak.allocated_bytes or 1) - 1
    return row


def _operations(model: nn.Module, method: str) -> int:
    """Of one token: 2 a weight forwards, 2 where gradients pass through, 2 where weights train."""
    total, passed, trained_ = 0, 0, 0
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name or "lora_" in name:
            continue
        size = elements(parameter)
        total += size
        trained_ += size * parameter.requires_grad
        passed += size * (method != "top_layers" or parameter.requires_grad)
    return 2 * (total + passed + trained_)
