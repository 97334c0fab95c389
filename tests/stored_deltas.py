"""Deltas of every kind in a registry, their tensors drawn at random instead of trained."""

import tiny_runs
import torch

from peftkit.modeling.loading import ModelSpec, held_dtype, load_model
from peftkit.modeling.parameters import set_precision, trainable_parameters

LORA = {"type": "lora", "r": 2}
SECTIONS = {
    "full": {"type": "full"},
    "top_layers": {"type": "top_layers", "num_layers": 1},
    "lora": LORA,
    "lora-other": LORA,
    "full-other": {"type": "full"},
    "saved-other": LORA | {"modules_to_save": ["pooler"]},
    "dora-other": LORA | {"use_dora": True},
    "lora-own-biases": LORA | {"bias": "lora_only"},
    "lora-own-biases-other": LORA | {"bias": "lora_only"},
    "lora-biases": LORA | {"bias": "all"},
    "lora-embeddings": LORA | {"target_modules": ["word_embeddings", "query"]},
    "lora-tokens": LORA | {"trainable_token_indices": [4, 5]},
    "lora-tokens-other": LORA | {"trainable_token_indices": [4, 5]},
    "rslora": LORA | {"use_rslora": True, "lora_dropout": 0.1},
    "dora": LORA | {"use_dora": True},
    "saved": LORA | {"modules_to_save": ["pooler"]},
    "ia3": {"type": "peft", "peft_type": "IA3"},
    "vera": {"type": "peft", "peft_type": "VERA", "target_modules": ["query"]},
    "prefix": {"type": "peft", "peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2},
}
QLORA = {"type": "qlora", "r": 2}


def labelled(count):
    """Overrides of the base's config for `count` labels."""
    labels = {i: f"label {i}" for i in range(count)}
    known = {"id2label": labels, "label2id": {v: k for k, v in labels.items()}}
    return tiny_runs.LABELS | known | {"num_labels": count, "problem_type": None}


def store(registry, folder, name, section, *, labels=2, precision="no", seed=0, **info):
    """Save a delta whose tensors are drawn from `seed`, as if it had been trained."""
    method = tiny_runs.make_method(section)
    spec = ModelSpec(tiny_runs.AUTO_CLASS, labelled(labels), None, precision)
    torch.manual_seed(seed)
    model = method.prepare(load_model(folder, spec, method.load_options()))
    set_precision(model, held_dtype(spec, method.load_options()))
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    delta = method.delta(model)
    about = tiny_runs.info_for(folder, method, delta, mixed_precision=precision)
    about = about.model_copy(update={"model": about.model | {"config": labelled(labels)}} | info)
    return registry.save(name, delta, about, base=folder)
