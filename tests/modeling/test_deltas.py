"""A delta goes on a base whole, or not at all."""

from dataclasses import replace

import pytest
import tiny_runs
import torch

from peftkit.contracts import Delta
from peftkit.errors import RegistryError
from peftkit.modeling.deltas import apply_delta

SECTIONS = {
    "full": {"type": "full"},
    "top_layers": {"type": "top_layers", "num_layers": 1},
    "lora": {"type": "lora", "r": 2},
    "peft": {"type": "peft", "peft_type": "IA3"},
    "prompt": {"type": "peft", "peft_type": "P_TUNING", "num_virtual_tokens": 2},
}
CLASSIFIER = {
    name: "base_model.model.classifier" if name in ("lora", "peft") else "classifier"
    for name in SECTIONS
} | {"prompt": "base_model.classifier"}


@pytest.fixture(scope="module", params=sorted(SECTIONS))
def case(request, base_of):
    """(name, method, delta) of a freshly prepared model."""
    method = tiny_runs.make_method(SECTIONS[request.param])
    model = tiny_runs.prepare(base_of("bert"), method)
    return request.param, method, method.delta(model)


def problems_of(folder, method, delta):
    base = tiny_runs.load_base(folder, method)
    with pytest.raises(RegistryError) as caught:
        apply_delta(base, delta)
    return caught.value.problems


def test_a_missing_tensor_is_refused(case, base_of):
    name, method, delta = case
    key = f"{CLASSIFIER[name]}.weight"
    tensors = {k: v for k, v in delta.tensors.items() if k != key}
    assert len(tensors) == len(delta.tensors) - 1
    problems = problems_of(base_of("bert"), method, replace(delta, tensors=tensors))
    assert problems == [f"delta: tensor '{key}' is missing"]


def test_an_extra_tensor_is_refused(case, base_of):
    _, method, delta = case
    tensors = {**delta.tensors, "classifier.wieght": torch.zeros(1)}
    problems = problems_of(base_of("bert"), method, replace(delta, tensors=tensors))
    assert problems == ["delta: tensor 'classifier.wieght' has no place in the model"]


def test_a_misshapen_tensor_is_refused(case, base_of):
    name, method, delta = case
    key = f"{CLASSIFIER[name]}.weight"
    tensors = {**delta.tensors, key: torch.zeros(3, 16)}
    problems = problems_of(base_of("bert"), method, replace(delta, tensors=tensors))
    assert problems == [f"delta: tensor '{key}' has shape [3, 16], the model [2, 16]"]


def test_all_problems_are_named_at_once(case, base_of):
    name, method, delta = case
    tensors = {**delta.tensors, "zzz": torch.zeros(1)}
    tensors[f"{CLASSIFIER[name]}.bias"] = torch.zeros(1)
    del tensors[f"{CLASSIFIER[name]}.weight"]
    assert problems_of(base_of("bert"), method, replace(delta, tensors=tensors)) == [
        f"delta: tensor '{CLASSIFIER[name]}.weight' is missing",
        "delta: tensor 'zzz' has no place in the model",
        f"delta: tensor '{CLASSIFIER[name]}.bias' has shape [1], the model [2]",
    ]


def test_an_adapter_without_one_of_its_matrices_is_refused(base_of):
    method = tiny_runs.make_method(SECTIONS["lora"])
    delta = method.delta(tiny_runs.prepare(base_of("bert"), method))
    key = next(k for k in delta.tensors if ".lora_B." in k)
    tensors = {k: v for k, v in delta.tensors.items() if k != key}
    problems = problems_of(base_of("bert"), method, replace(delta, tensors=tensors))
    assert problems == [f"delta: tensor '{key}' is missing"]


@pytest.mark.parametrize(("section", "lines"), [("full", 16), ("lora", 12)])
def test_a_delta_of_a_deeper_base_is_refused(base_of, section, lines):
    method = tiny_runs.make_method(SECTIONS[section])
    delta = method.delta(tiny_runs.prepare(base_of("bert"), method))
    problems = problems_of(base_of("bert", depth=2), method, delta)
    assert len(problems) == lines
    assert all(line.endswith("has no place in the model") for line in problems)


def test_a_refused_delta_of_weights_changes_nothing(base_of):
    method = tiny_runs.make_method(SECTIONS["full"])
    base = tiny_runs.load_base(base_of("bert"), method)
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    tensors = {n: p + 1 for n, p in before.items()} | {"zzz": torch.zeros(1)}
    with pytest.raises(RegistryError):
        apply_delta(base, Delta("weights", tensors))
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters())


@pytest.mark.parametrize("section", ["lora", "peft", "prompt"])
def test_an_adapter_keeps_float32_on_a_base_of_16_bits(base_of, section):
    method = tiny_runs.make_method(SECTIONS[section])
    model = tiny_runs.prepare(base_of("bert"), method, mixed_precision="bf16")
    delta = method.delta(model)
    # Values that a 16-bit tensor cannot hold.
    tensors = {name: t + 1 / 3 for name, t in delta.tensors.items()}
    base = tiny_runs.load_base(base_of("bert"), method, mixed_precision="bf16")
    put = method.delta(apply_delta(base, replace(delta, tensors=tensors)))
    assert put.tensors.keys() == tensors.keys()
    assert [n for n, t in tensors.items() if not torch.equal(put.tensors[n], t)] == []


def test_an_adapter_names_its_base(base_of):
    method = tiny_runs.make_method(SECTIONS["lora"])
    base = tiny_runs.load_base(base_of("bert"), method)
    base.name_or_path = "org/base"
    settings = method.delta(method.prepare(base)).adapter_config
    assert (settings["base_model_name_or_path"], settings["inference_mode"]) == ("org/base", True)
    assert settings["task_type"] == "SEQ_CLS"
