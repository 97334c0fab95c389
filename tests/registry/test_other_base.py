"""Five ways in which a base can be another, each refused with both digests, each way of loading."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file, save_file
from stored_deltas import LORA, SECTIONS, store

from peftkit.errors import RegistryError, SourceError
from peftkit.modeling.identity import base_digest, tokenizer_digest
from peftkit.registry import Registry
from peftkit.registry.fitting import BaseIdentity
from peftkit.registry.loading import load_delta
from peftkit.registry.shared import SharedBase

DELTAS = {"lora": LORA, "full": SECTIONS["full"]}


@pytest.fixture(scope="module")
def stored(base_of, tmp_path_factory):
    """(base folder, registry) of an adapter and of changed weights."""
    root = tmp_path_factory.mktemp("stored")
    folder = Path(shutil.copytree(base_of("bert"), root / "base"))
    registry = Registry(root / "registry")
    for name, section in DELTAS.items():
        store(registry, folder, name, section)
    return folder, registry


@pytest.fixture
def base(stored, base_of):
    """The base's folder, to be changed; it is as it was afterwards."""
    folder = stored[0]
    yield folder
    shutil.rmtree(folder)
    shutil.copytree(base_of("bert"), folder)


def other_weights(folder, base_of):
    shutil.copy(base_of("bert", seed=7) / "model.safetensors", folder)


def other_depth(folder, base_of):
    shutil.copytree(base_of("bert", depth=2), folder, dirs_exist_ok=True)


def other_vocabulary(folder, base_of):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    words = tensors["embeddings.word_embeddings.weight"]
    tensors["embeddings.word_embeddings.weight"] = torch.cat([words, words[:1]])
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": len(words) + 1}))


def other_quantisation(folder, base_of):
    """The same base, kept in NF4."""
    from transformers import AutoModel, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModel.from_pretrained(folder, quantization_config=settings, device_map="cpu")
    model.save_pretrained(folder)


def other_tokenizer(folder, base_of):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"film"', '"movie"'))


CHANGES = [other_weights, other_depth, other_vocabulary, other_quantisation, other_tokenizer]


def attach(name, folder, registry):
    SharedBase(folder, registry).attach(name)


def load(name, folder, registry):
    load_delta(name, registry=registry)


CASES = [
    (change, way)
    for change in CHANGES
    for way in (load, attach)
    if (change, way) != (other_quantisation, attach)  # below: it is no base for any delta
]


@pytest.mark.parametrize("name", DELTAS)
@pytest.mark.parametrize(("change", "way"), CASES)
def test_another_base_is_refused_with_both_digests(change, name, way, stored, base, base_of):
    digest = tokenizer_digest if change is other_tokenizer else base_digest
    before = digest(base)
    change(base, base_of)
    with pytest.raises(RegistryError) as caught:
        way(name, base, stored[1])
    what = "tokenizer" if change is other_tokenizer else "weights"
    said = f"{name}@v1: trained on {base} with {what} {before}, but {base} has {digest(base)}"
    assert said in caught.value.problems
    assert before != digest(base)


def test_a_base_whose_files_are_quantised_is_refused(stored, base, base_of):
    other_quantisation(base, base_of)
    with pytest.raises(SourceError) as caught:
        attach("lora", base, stored[1])
    assert caught.value.problems == [
        f"{base}: its files are quantised already (bitsandbytes); take the base in 16 or 32 bits, "
        "which method.type: qlora quantises as it is loaded"
    ]


@pytest.mark.parametrize("change", [other_weights, other_tokenizer])
def test_without_the_comparison_another_base_passes(change, stored, base, base_of, monkeypatch):
    """The planted fault: these bases fit in every shape, and nothing else would notice."""
    change(base, base_of)
    monkeypatch.setattr(BaseIdentity, "problems", lambda self, stored: [])
    model = load_delta("lora", registry=stored[1]).model
    tiny_runs.logits_of(model, tiny_runs.make_batch(base_of("bert")))
