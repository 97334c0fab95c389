"""What does not belong on the shared base is refused in one error, and nothing is changed."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from stored_deltas import LORA, QLORA, SECTIONS, store

from peftkit.contracts import Delta, Quantisation
from peftkit.errors import RegistryError
from peftkit.modeling.identity import base_digest, tokenizer_digest
from peftkit.modeling.sharing import Held
from peftkit.registry.shared import SharedBase
from peftkit.registry.store import Registry

ABSENT = f"sha256:{'1' * 64}"


@pytest.fixture(scope="module")
def stored(tmp_path_factory, base_of):
    registry = Registry(tmp_path_factory.mktemp("registry"))
    store(registry, base_of("bert"), "lora", LORA)
    store(registry, base_of("bert"), "top", SECTIONS["top_layers"])
    return registry.root


@pytest.fixture
def registry(stored, tmp_path):
    """One to be changed by a test."""
    return Registry(shutil.copytree(stored, tmp_path / "registry", symlinks=True))


@pytest.fixture
def shared(base_of, registry):
    return SharedBase(base_of("bert"), registry)


def refusal(shared, reference):
    """The problems; whatever was attached must still be so, and the base as it was."""
    before = shared.attached, shared.active, shared.digest()
    with pytest.raises(RegistryError) as caught:
        shared.attach(reference)
    assert (shared.attached, shared.active, shared.digest()) == before
    return caught.value.problems


def changed(registry, name, change, **info):
    """Store `name` again, its tensors and manifest changed."""
    stored = registry.find(name)
    delta = registry.read_delta(stored)
    tensors = dict(delta.tensors)
    change(tensors)
    delta = Delta(delta.kind, tensors, delta.adapter_config)
    return registry.save(name, delta, stored.info.model_copy(update=info))


def test_every_difference_of_base_and_holding_is_in_one_error(base_of, registry):
    folder = base_of("bert")
    model = registry.find("lora").info.model | {"mixed_precision": "bf16"}
    config = registry.find("lora").info.base_config | {"hidden_act": "relu"}
    stored = changed(
        registry,
        "lora",
        lambda tensors: None,
        base_digest=ABSENT,
        tokenizer_digest=ABSENT,
        base_config=config,
        quantisation=Quantisation(),
        model=model,
    )
    path = (stored.path / "adapter_model.safetensors").resolve()
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    problems = refusal(SharedBase(folder, registry), "lora")
    assert problems[0] == (
        f"lora@v2: trained on {folder} with weights {ABSENT}, but {folder} has "
        f"{base_digest(folder)}"
    )
    assert problems[1].endswith(f"tokenizer {ABSENT}, but {folder} has {tokenizer_digest(folder)}")
    assert problems[2].endswith("hidden_act: then 'relu', now 'gelu'")
    assert "held in quantisation Quantisation(" in problems[3]
    assert problems[4].endswith("held in precision torch.bfloat16, this one is in torch.float32")
    assert "changed, expected sha256:" in problems[5]
    assert len(problems) == 6


@pytest.mark.parametrize(
    ("section", "precision", "held"),
    [
        (LORA, "no", Held(torch.bfloat16)),
        (LORA, "bf16", Held()),
        (LORA, "no", Held(quantisation=Quantisation())),
        (QLORA, "no", Held()),
        (QLORA | {"double_quant": False}, "no", Held(quantisation=Quantisation())),
    ],
)
def test_a_base_held_in_another_way_is_refused(base_of, registry, section, precision, held):
    store(registry, base_of("bert"), "other", section, precision=precision)
    shared = SharedBase(base_of("bert"), registry, held=held)
    assert all("other@v1: trained over a base held in" in line for line in refusal(shared, "other"))


def test_a_changed_base_folder_is_noticed(base_of, registry, tmp_path):
    shutil.copytree(base_of("bert"), tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors["encoder.layer.0.output.dense.bias"].view(torch.int32)[3] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})
    assert len(refusal(SharedBase(tmp_path / "base", registry), "lora")) == 1


def drop_and_add(tensors):
    tensors["strange.weight"] = tensors.pop(sorted(tensors)[-1])


def reshape(tensors):
    for name in sorted(tensors)[:2]:
        tensors[name] = torch.cat([tensors[name], tensors[name]])


@pytest.mark.parametrize("attach_first", [False, True])
@pytest.mark.parametrize("change", [drop_and_add, reshape])
@pytest.mark.parametrize("name", ["lora", "top"])
def test_tensors_that_do_not_fit_are_named(shared, registry, name, change, attach_first):
    if attach_first:
        shared.attach(f"{name}@v1")
        shared.switch(f"{name}@v1")
    changed(registry, name, change)
    problems = refusal(shared, f"{name}@v2")
    words = ["has shape"] * 2 if change is reshape else ["is missing", "has no place in the model"]
    assert len(problems) == 2
    assert all(word in line for word, line in zip(words, problems, strict=True))


@pytest.mark.parametrize("init", ["olora", "pissa_niter_4", "loftq"])
def test_an_adapter_that_would_move_the_base_is_refused(shared, registry, init):
    stored = registry.find("lora")
    delta = registry.read_delta(stored)
    settings = {**delta.adapter_config, "init_lora_weights": init}
    registry.save("lora", Delta("adapter", delta.tensors, settings), stored.info)
    assert "which others share" in refusal(shared, "lora@v2")[0]


def test_settings_that_peft_refuses_are_a_plain_error(shared, registry):
    stored = registry.find("lora")
    delta = registry.read_delta(stored)
    settings = {**delta.adapter_config, "target_modules": ["nowhere"]}
    registry.save("lora", Delta("adapter", delta.tensors, settings), stored.info)
    assert refusal(shared, "lora@v2")[0].startswith("lora@v2: PEFT refuses it: No modules were")


def test_unknown_names(shared, registry, base_of):
    assert "no delta 'absent'" in refusal(shared, "absent")[0]
    with pytest.raises(RegistryError, match="'lora': no such delta is attached; none is"):
        shared.detach("lora")
    shared.attach("lora")
    with pytest.raises(RegistryError, match="did you mean 'lora@v1'"):
        shared.switch("loar")
    store(registry, base_of("bert"), "lora", LORA)
    shared.attach("lora")
    with pytest.raises(RegistryError, match="attached as lora@v1, lora@v2; say which"):
        shared.switch("lora")


def test_a_delta_that_was_detached_does_not_answer(shared):
    shared.attach("lora")
    shared.switch("lora")
    shared.detach("lora")
    with pytest.raises(RegistryError, match="'lora@v1': no such delta is attached"):
        shared({"input_ids": torch.tensor([[2, 3]])})
    shared.switch(None)
    assert shared({"input_ids": torch.tensor([[2, 3]])}).shape == (1, 2, 16)


def test_using_switches_back_when_the_block_fails(shared):
    shared.attach("lora")
    with pytest.raises(RegistryError, match="deltas: 1 for"), shared.using("lora"):
        shared({"input_ids": torch.tensor([[2, 3], [2, 3]])}, deltas=[shared.active])
    assert shared.active is None
