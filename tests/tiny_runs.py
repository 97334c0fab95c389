"""A run without the loop: a method trained for a few steps on the task's own loss, and stored."""

import random
from functools import cache

import torch
from transformers import AutoTokenizer

from peftkit import plugins
from peftkit.modeling.config import described
from peftkit.modeling.identity import base_digest, tokenizer_digest
from peftkit.modeling.loading import ModelSpec, held_dtype, load_model
from peftkit.modeling.parameters import set_precision, train_mode
from peftkit.registry.store import DeltaInfo, RunSummary

WORDS = ["the", "film", "was", "not", "never", "good", "bad", "warm", "great", "awful", "slow"]
TASK = {
    "type": "classification",
    "dataset": "sample:reviews",
    "text_columns": ["sentence"],
    "labels": ["negative", "positive"],
}
LABELS = {
    "num_labels": 2,
    "id2label": {0: "negative", 1: "positive"},
    "label2id": {"negative": 0, "positive": 1},
    "problem_type": "single_label_classification",
    "pad_token_id": 0,
}
AUTO_CLASS = "AutoModelForSequenceClassification"
SFT = {
    "type": "sft",
    "dataset": "none",
    "prompt": "the film {prompt}",
    "completion": " {completion}",
    "max_length": 64,
}
SPECS = {"classification": (AUTO_CLASS, LABELS), "sft": ("AutoModelForCausalLM", {})}
"""Auto class and overrides of the config, by task."""


def make_method(section):
    """The method that a recipe's section configures."""
    chosen = plugins.load("methods", section["type"])
    return chosen(chosen.Config.model_validate(section))


def make_task(name="classification"):
    chosen = plugins.load("tasks", name)
    return chosen(chosen.Config.model_validate({"classification": TASK, "sft": SFT}[name]))


def make_batch(folder, *, size=8, seed=0):
    """Short texts as the task tokenises and collates them, with alternating labels."""
    return dict(_batch(folder, size, seed))


@cache
def _batch(folder, size, seed):
    task, tokenizer = make_task(), AutoTokenizer.from_pretrained(folder)
    rng = random.Random(seed)
    texts = [[" ".join(rng.choices(WORDS, k=rng.randint(2, 9)))] for _ in range(size)]
    rows = [{**row, "label": i % 2} for i, row in enumerate(task.encode(tokenizer, texts))]
    return task.collate(rows)


def autocast(mixed_precision):
    """What Accelerate puts around a forward at this precision on a CPU."""
    return torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision == "bf16")


def logits_of(model, batch, *, mixed_precision="no"):
    """Eval-mode logits of a collated batch; the labels stay out of it."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    model.eval()
    with torch.no_grad(), autocast(mixed_precision):
        return model(**inputs).logits


def load_base(folder, method, *, dropout=None, mixed_precision="no", seed=1):
    """A base with a head drawn from `seed`, loaded as `method` asks."""
    torch.manual_seed(seed)
    spec = ModelSpec(AUTO_CLASS, LABELS, dropout, mixed_precision)
    return load_model(folder, spec, method.load_options())


def prepare(folder, method, *, dropout=None, mixed_precision="no", task="classification"):
    """Loaded, prepared and held as the experiment does it."""
    torch.manual_seed(1)
    spec = ModelSpec(*SPECS[task], dropout, mixed_precision)
    prepared = method.prepare(load_model(folder, spec, method.load_options()))
    set_precision(prepared, held_dtype(spec, method.load_options()))
    return prepared


def train(model, method, folder, *, mixed_precision="no", learning_rate=1e-2):
    """Three steps of AdamW on the task's own loss, in place."""
    task = make_task()
    groups = method.parameter_groups(model, learning_rate)
    settings = [{"params": g.parameters, "lr": g.learning_rate} for g in groups]
    optimizer = torch.optim.AdamW(settings, weight_decay=0.0)
    train_mode(model)
    for step in range(3):
        batch = make_batch(folder, seed=step)
        labels = batch.pop("labels")
        with autocast(mixed_precision):
            outputs = model(**batch)
        (task.loss(outputs, labels) / len(labels)).backward()
        optimizer.step()
        optimizer.zero_grad()


def info_for(folder, method, delta, *, mixed_precision="no", dropout=None):
    """What the experiment would say of the delta; written out here, not taken from it."""
    options = method.load_options()
    return DeltaInfo(
        kind=delta.kind,
        base_name=str(folder),
        base_digest=base_digest(folder),
        base_config=described(folder),
        quantisation=options.quantisation,
        tokenizer_digest=tokenizer_digest(folder),
        task=TASK,
        method=method.config.model_dump(),
        labels=TASK["labels"],
        model={
            "auto_class": AUTO_CLASS,
            "config": LABELS,
            "dropout": dropout,
            "mixed_precision": mixed_precision,
            "frozen": options.frozen,
            "keeps_float32": options.keeps_float32,
        },
        recipe={"base": {"name": str(folder)}},
        recipe_digest=f"sha256:{'0' * 64}",
        run=RunSummary(record="record.json", seed=1, status="completed", metrics={}),
        stand_in=True,
    )
