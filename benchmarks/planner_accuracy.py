"""Predicted against measured peaks of live tensors, over methods and architectures.

Each cell builds a small model of random weights, trains it for three steps with peftkit's own
trainer under its memory meter, and compares the peak of the training steps, and that of
evaluation, with what the planner said from the config.

    python benchmarks/planner_accuracy.py --out benchmarks/results/planner_accuracy.json
    python benchmarks/planner_accuracy.py --device cuda --mixed-precision bf16 --width 768 --jobs 12
"""

import argparse
import gc
import itertools
import json
import multiprocessing
import statistics
import tempfile
import warnings
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig
from transformers.utils import logging

from peftkit import plugins
from peftkit.contracts import Split
from peftkit.memory.meter import MemoryMeter
from peftkit.modeling.loading import ModelSpec, held_dtype, load_model, spec_config
from peftkit.modeling.parameters import checkpoint_activations, set_precision
from peftkit.planning.predict import predict
from peftkit.planning.setting import Setting, Shape
from peftkit.tasks.classification import Classification, ClassificationConfig
from peftkit.tasks.encoding import Padding
from peftkit.training import progress
from peftkit.training.config import TrainingConfig
from peftkit.training.loop import Trainer
from peftkit.training.signals import StopRequest
from peftkit.training.start import place
from peftkit.training.state import Job

VOCABULARY = 2000
ARCHITECTURES = ("bert", "roberta", "distilbert", "gpt2", "llama", "t5")
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "top_layers": {"num_layers": 2},
    "lora": {"r": 8},
    "qlora": {"r": 8},
}


@dataclass(frozen=True)
class Where:
    """What the cells run on, and the size of their models."""

    device: str = "cpu"
    mixed_precision: str = "no"
    width: int = 256
    depth: int = 4

    def config(self, name: str) -> PretrainedConfig:
        """An architecture of this size, with heads of 64."""
        width, depth, heads = self.width, self.depth, self.width // 64
        encoder = {
            "hidden_size": width,
            "num_hidden_layers": depth,
            "num_attention_heads": heads,
            "intermediate_size": 4 * width,
        }
        own = {
            "bert": encoder,
            "roberta": encoder | {"max_position_embeddings": 514, "pad_token_id": 1},
            "distilbert": {"dim": width, "n_layers": depth, "n_heads": heads}
            | {"hidden_dim": 4 * width},
            "gpt2": {"n_embd": width, "n_layer": depth, "n_head": heads},
            "llama": encoder | {"num_key_value_heads": heads // 2},
            "t5": {"d_model": width, "num_layers": depth, "num_heads": heads, "d_ff": 4 * width}
            | {"d_kv": 64, "eos_token_id": 1, "decoder_start_token_id": 0},
        }
        common = {"vocab_size": VOCABULARY, "pad_token_id": 0}
        return AutoConfig.for_model(name, **(common | own[name]))


def task() -> Classification:
    """Two classes, without data or a tokenizer."""
    made = Classification(
        ClassificationConfig(type="classification", dataset="none", text_columns=["text"])
    )
    made._padding = Padding(token_id=0, type_id=0, side="right")
    return made


def rows(count: int, shape: Shape) -> Split:
    """Texts of one length; if the shape is padded every second is a token shorter."""
    made = []
    for i in range(count):
        length = shape.tokens - i % 2 * shape.padded
        row = {"input_ids": [5] * (length - 1) + [1], "attention_mask": [1] * length}
        made.append({**row, "label": i % 2})
    return Split("train", made, "sha256:" + "0" * 64)


def trained(folder: Path, setting: Setting, train: Split) -> tuple[Trainer, MemoryMeter]:
    """A trainer after its last step, one evaluation, and the meter that watched them."""
    AcceleratorState._reset_state(reset_partial_state=True)
    method = setting.method
    accelerator = Accelerator(cpu=not setting.on_gpu, mixed_precision=setting.spec.mixed_precision)
    meter = MemoryMeter(accelerator.device)
    options = method.load_options()
    with meter.phase("load"):
        model = load_model(folder, setting.spec, options)
        prepared = method.prepare(model)
        set_precision(prepared, held_dtype(setting.spec, options))
        place(prepared, accelerator)
    if setting.training.gradient_checkpointing:
        checkpoint_activations(model)
    work = tempfile.TemporaryDirectory()
    job = Job(
        model=prepared,
        groups=method.parameter_groups(prepared, setting.training.learning_rate),
        task=setting.task,
        train=train,
        holdout=None,
        config=setting.training,
        seed=0,
        folder=Path(work.name),
    )
    trainer = Trainer(job, accelerator, meter)
    with work:
        trainer.fit(StopRequest())
    count = setting.evaluation.examples
    trainer.evaluator.evaluate(trainer.model, setting.task, rows(count, setting.evaluation))
    return trainer, meter


def setting_of(
    folder: Path, method_name: str, shape: Shape, where: Where, *, checkpointing: bool
) -> Setting:
    """One classifier of two classes, as a recipe would describe it."""
    cls = plugins.load("methods", method_name)
    spec = ModelSpec(
        "AutoModelForSequenceClassification",
        {"num_labels": 2},
        mixed_precision=where.mixed_precision,
    )
    training = TrainingConfig(
        learning_rate=1e-4,
        num_train_epochs=1.0,
        per_device_train_batch_size=shape.examples,
        per_device_eval_batch_size=shape.examples,
        gradient_checkpointing=checkpointing,
    )
    method = cls(cls.Config(type=method_name, **METHODS[method_name]))
    config = spec_config(folder, spec)
    on_gpu = where.device == "cuda"
    return Setting(method, task(), training, spec, config, shape, shape, on_gpu=on_gpu)


def cell(
    work: str, name: str, method_name: str, shape: Shape, where: Where, *, checkpointing: bool
) -> Any:
    """One comparison."""
    _quiet()
    gc.collect()  # a GPU's allocator counts what an earlier cell left behind
    folder = Path(work) / name
    setting = setting_of(folder, method_name, shape, where, checkpointing=checkpointing)
    found = predict(setting).by_record_phase()
    _, meter = trained(folder, setting, rows(3 * shape.examples, shape))
    peaks = meter.result()
    row = {
        "architecture": name,
        "method": method_name,
        "examples": shape.examples,
        "tokens": shape.tokens,
        "checkpointing": checkpointing,
    }
    for phase in ("load", "train_step", "eval"):
        true = peaks[phase].allocated_bytes
        row |= {f"{phase}_measured": true, f"{phase}_predicted": found[phase]}
        row[f"{phase}_error"] = found[phase] / true - 1
    return row


def _quiet() -> None:
    progress.Progress.report = lambda self, row: None  # type: ignore[method-assign]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def all_cells(where: Where, only: set[str], jobs: int) -> list[dict[str, Any]]:
    """Every combination; T5 has no single stack of blocks for top_layers."""
    shapes = [Shape(b, t) for b, t in itertools.product((4, 16), (32, 128))]
    with tempfile.TemporaryDirectory() as work, _pool(jobs) as pool:
        started = []
        for name in ARCHITECTURES:
            torch.manual_seed(0)
            model = AutoModelForSequenceClassification.from_config(where.config(name))
            model.save_pretrained(Path(work) / name)
            for method, shape, on in itertools.product(METHODS, shapes, (False, True)):
                if {name, method} >= only and (name, method) != ("t5", "top_layers"):
                    arguments = (work, name, method, shape, where)
                    started.append(pool.submit(cell, *arguments, checkpointing=on))
        found = []
        for future in started:
            found.append(future.result())
            print(json.dumps(found[-1]), flush=True)
    return found


def _pool(jobs: int) -> Executor:
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(
        jobs, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)
    )


def summarised(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Worst and median error of each phase."""
    summary = {}
    for phase in ("train_step", "eval"):
        errors = [abs(row[f"{phase}_error"]) for row in found]
        summary[phase] = {"worst": max(errors), "median": statistics.median(errors)}
    return summary


def main() -> None:
    """Run all cells, print the worst and the median, write all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", default=[], help="architectures, methods")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--width", type=int, default=256, help="a multiple of 128")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    _quiet()
    where = Where(arguments.device, arguments.mixed_precision, arguments.width, arguments.depth)
    found = all_cells(where, set(arguments.only), arguments.jobs)
    summary = summarised(found)
    print(json.dumps({"cells": len(found), **summary}, indent=2))
    if arguments.out:
        said = {"where": asdict(where), "summary": summary, "cells": found}
        arguments.out.write_text(f"{json.dumps(said)}\n")


if __name__ == "__main__":
    main()
