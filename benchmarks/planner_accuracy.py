"""Predicted against measured peaks of live tensors, over methods and architectures.

Each cell builds a small model of random weights, trains it for three steps with peftkit's own
trainer under its memory meter, and compares the peak of the training steps, and that of
evaluation, with what the planner said from the config.

    python benchmarks/planner_accuracy.py --out benchmarks/results/planner_accuracy.json
"""

import argparse
import gc
import itertools
import json
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.utils import logging

from peftkit import plugins
from peftkit.contracts import Split
from peftkit.memory.meter import MemoryMeter
from peftkit.modeling.loading import ModelSpec, held_dtype, load_model, spec_config
from peftkit.modeling.parameters import set_precision
from peftkit.planning.predict import predict
from peftkit.planning.setting import Setting, Shape
from peftkit.tasks.classification import Classification, ClassificationConfig
from peftkit.tasks.encoding import Padding
from peftkit.training import progress
from peftkit.training.config import TrainingConfig
from peftkit.training.loop import Trainer
from peftkit.training.signals import StopRequest
from peftkit.training.state import Job

WIDTH, DEPTH, VOCABULARY = 256, 4, 2000
COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0}
ENCODER = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "intermediate_size": 4 * WIDTH,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bert": ENCODER,
    "roberta": ENCODER | {"max_position_embeddings": 514, "pad_token_id": 1},
    "distilbert": {"dim": WIDTH, "n_layers": DEPTH, "n_heads": 4, "hidden_dim": 4 * WIDTH},
    "gpt2": {"n_embd": WIDTH, "n_layer": DEPTH, "n_head": 4},
    "llama": ENCODER | {"num_key_value_heads": 2},
    "t5": {"d_model": WIDTH, "num_layers": DEPTH, "num_heads": 4, "d_ff": 4 * WIDTH, "d_kv": 64}
    | {"eos_token_id": 1, "decoder_start_token_id": 0},
}
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "top_layers": {"num_layers": 2},
    "lora": {"r": 8},
    "qlora": {"r": 8},
}


def task() -> Classification:
    """Two classes, without data or a tokenizer."""
    made = Classification(
        ClassificationConfig(type="classification", dataset="none", text_columns=["text"])
    )
    made._padding = Padding(token_id=0, type_id=0, side="right")
    return made


def rows(count: int, tokens: int) -> Split:
    """Texts of one length; every second is a token shorter, so that there is padding."""
    made = [
        {"input_ids": [5] * (tokens - i % 2 - 1) + [1], "attention_mask": [1] * (tokens - i % 2)}
        | {"label": i % 2}
        for i in range(count)
    ]
    return Split("train", made, "sha256:" + "0" * 64)


def measured(folder: Path, spec: ModelSpec, method: Any, setting: Setting, work: Path) -> Any:
    """Peaks of the meter over three steps and one evaluation."""
    accelerator = Accelerator(cpu=True)
    meter = MemoryMeter(accelerator.device)
    options = method.load_options()
    model = load_model(folder, spec, options)
    prepared = method.prepare(model)
    set_precision(prepared, held_dtype(spec, options))
    if setting.training.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    split = rows(3 * setting.train.examples, setting.train.tokens)
    job = Job(
        model=prepared,
        groups=method.parameter_groups(prepared, setting.training.learning_rate),
        task=setting.task,
        train=split,
        holdout=None,
        config=setting.training,
        seed=0,
        folder=work,
    )
    trainer = Trainer(job, accelerator, meter)
    trainer.fit(StopRequest())
    count = setting.evaluation.examples
    trainer.evaluator.evaluate(trainer.model, setting.task, rows(count, setting.evaluation.tokens))
    return meter.result()


def cell(folder: Path, name: str, method_name: str, shape: Shape, *, checkpointing: bool) -> Any:
    """One comparison; T5 has no single stack of blocks for top_layers."""
    cls = plugins.load("methods", method_name)
    spec = ModelSpec("AutoModelForSequenceClassification", {"num_labels": 2})
    training = TrainingConfig(
        learning_rate=1e-4,
        num_train_epochs=1.0,
        per_device_train_batch_size=shape.examples,
        per_device_eval_batch_size=shape.examples,
        gradient_checkpointing=checkpointing,
    )
    config = cls.Config(type=method_name, **METHODS[method_name])
    setting = Setting(cls(config), task(), training, spec, spec_config(folder, spec), shape, shape)
    found = predict(setting).by_record_phase()
    with tempfile.TemporaryDirectory() as work:
        peaks = measured(folder, spec, cls(config), setting, Path(work))
    gc.collect()
    row = {
        "architecture": name,
        "method": method_name,
        "examples": shape.examples,
        "tokens": shape.tokens,
        "checkpointing": checkpointing,
    }
    for phase in ("train_step", "eval"):
        true = peaks[phase].allocated_bytes
        row |= {f"{phase}_measured": true, f"{phase}_predicted": found[phase]}
        row[f"{phase}_error"] = found[phase] / true - 1
    return row


def main() -> None:
    """Run all cells, print the worst and the median, write all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", default=[], help="architectures, methods")
    arguments = parser.parse_args()
    progress.Progress.report = lambda self, row: None  # type: ignore[method-assign]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    shapes = [Shape(b, t) for b, t in itertools.product((4, 16), (32, 128))]
    found = []
    with tempfile.TemporaryDirectory() as work:
        for name, own in ARCHITECTURES.items():
            folder = Path(work) / name
            config = AutoConfig.for_model(name, **(COMMON | own))
            torch.manual_seed(0)
            AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
            for method, shape, on in itertools.product(METHODS, shapes, (False, True)):
                wanted = {name, method} >= set(arguments.only)
                if not wanted or (name, method) == ("t5", "top_layers"):
                    continue
                found.append(cell(folder, name, method, shape, checkpointing=on))
                print(json.dumps(found[-1]), flush=True)
    summary = {}
    for phase in ("train_step", "eval"):
        errors = [abs(row[f"{phase}_error"]) for row in found]
        summary[phase] = {"worst": max(errors), "median": statistics.median(errors)}
    print(json.dumps({"cells": len(found), **summary}, indent=2))
    if arguments.out:
        arguments.out.write_text(f"{json.dumps({'summary': summary, 'cells': found})}\n")


if __name__ == "__main__":
    main()
