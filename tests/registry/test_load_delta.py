"""A stored delta meets the very base and tokenizer that it was trained on, or nothing."""

import json
import shutil

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file, save_file

from peftkit import registry
from peftkit.errors import RegistryError
from peftkit.modeling.identity import base_digest, tokenizer_digest
from peftkit.registry.loading import load_delta
from peftkit.registry.store import Registry

SECTIONS = {
    "full": {"type": "full"},
    "top_layers": {"type": "top_layers", "num_layers": 1},
    "lora": {"type": "lora", "r": 2},
    "lora-biases": {"type": "lora", "r": 2, "bias": "all"},
    "qlora": {"type": "qlora", "r": 2},
    "ia3": {"type": "peft", "peft_type": "IA3"},
    "prefix": {"type": "peft", "peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2},
}


def trained_and_stored(folder, registry, section, precision="no"):
    """Train, store as `delta`, and return the trained model."""
    method = tiny_runs.make_method(section)
    model = tiny_runs.prepare(folder, method, mixed_precision=precision)
    tiny_runs.train(model, method, folder, mixed_precision=precision)
    delta = method.delta(model)
    info = tiny_runs.info_for(folder, method, delta, mixed_precision=precision)
    registry.save("delta", delta, info)
    return model


@pytest.mark.parametrize("architecture", ["bert", "llama"])
@pytest.mark.parametrize("name", sorted(SECTIONS))
def test_a_run_in_bf16_comes_back_to_the_last_bit(base_of, tmp_path, name, architecture):
    if (name, architecture) == ("lora-biases", "llama"):
        pytest.skip("it has no biases")
    folder, registry = base_of(architecture), Registry(tmp_path)
    model = trained_and_stored(folder, registry, SECTIONS[name], "bf16")
    loaded = load_delta("delta", registry=registry)
    batch = tiny_runs.make_batch(folder, seed=99)
    expected = tiny_runs.logits_of(model, batch, mixed_precision="bf16")
    assert torch.equal(tiny_runs.logits_of(loaded.model, batch, mixed_precision="bf16"), expected)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", sorted(SECTIONS))
def test_every_parameter_is_held_as_in_training(base_of, tmp_path, name, precision):
    registry = Registry(tmp_path)
    model = trained_and_stored(base_of("bert"), registry, SECTIONS[name], precision)
    loaded = load_delta("delta", registry=registry).model
    assert dtypes_in_use(loaded) == dtypes_in_use(model)


def dtypes_in_use(model):
    # PEFT keeps the head that was there before training, and does not use it.
    return {n: p.dtype for n, p in model.named_parameters() if ".original_module." not in n}


@pytest.fixture(scope="module")
def stored(base_of, tmp_path_factory):
    """(base folder, registry) of a LoRA whose base lies where it may be changed."""
    root = tmp_path_factory.mktemp("stored")
    folder = root / "base"
    shutil.copytree(base_of("bert"), folder)
    registry = Registry(root / "registry")
    trained_and_stored(folder, registry, SECTIONS["lora"])
    return folder, registry


@pytest.fixture
def in_place_of_base(stored, base_of):
    """Puts another base where the recipe finds its own; the old one comes back afterwards."""
    folder, _ = stored

    def put(other):
        shutil.rmtree(folder)
        shutil.copytree(other, folder)

    yield put
    put(base_of("bert"))


def refusal(stored):
    with pytest.raises(RegistryError) as caught:
        load_delta("delta", registry=stored[1])
    return str(caught.value)


def mismatch(stored, what, expected, found):
    folder = stored[0]
    return f"delta@v1: trained on {folder} with {what} {expected}, but {folder} has {found}"


def test_it_loads_on_its_own_base(stored):
    loaded = load_delta("delta", registry=stored[1])
    assert loaded.stored.version == "v1"
    assert loaded.task.config.labels == ["negative", "positive"]
    assert loaded.model.config.id2label == {0: "negative", 1: "positive"}
    assert loaded.tokenizer("film")["input_ids"] == [2, 6, 3]


@pytest.mark.parametrize("other", ["weights", "depth", "one bit"])
def test_another_base_is_refused_with_both_digests(stored, base_of, in_place_of_base, other):
    own = base_digest(stored[0])
    choices = {"weights": {"seed": 7}, "depth": {"depth": 4}, "one bit": {}}
    in_place_of_base(base_of("bert", **choices[other]))
    if other == "one bit":
        path = stored[0] / "model.safetensors"
        tensors = load_file(path)
        tensors["encoder.layer.0.output.dense.bias"].view(torch.int32)[3] ^= 1
        save_file(tensors, path, metadata={"format": "pt"})
    lines = [mismatch(stored, "weights", own, base_digest(stored[0]))]
    if other == "depth":
        line = "num_hidden_layers: then 3, now 4"
        lines.append(f"delta@v1: {stored[0]} has another config than {stored[0]} had: {line}")
    assert refusal(stored).splitlines() == lines


def test_another_vocabulary_is_refused_with_all_digests(stored, in_place_of_base, base_of):
    expected = base_digest(stored[0]), tokenizer_digest(stored[0])
    in_place_of_base(base_of("bert"))
    path = stored[0] / "model.safetensors"
    tensors = load_file(path)
    words = tensors["embeddings.word_embeddings.weight"]
    tensors["embeddings.word_embeddings.weight"] = torch.cat([words, words[:1]])
    save_file(tensors, path, metadata={"format": "pt"})
    vocabulary = stored[0] / "tokenizer.json"
    content = json.loads(vocabulary.read_text())
    content["model"]["vocab"]["new"] = len(words)
    vocabulary.write_text(json.dumps(content))
    assert refusal(stored) == "\n".join(
        [
            mismatch(stored, "weights", expected[0], base_digest(stored[0])),
            mismatch(stored, "tokenizer", expected[1], tokenizer_digest(stored[0])),
        ]
    )


def test_another_tokenizer_is_refused_with_both_digests(stored, in_place_of_base, base_of):
    own = tokenizer_digest(stored[0])
    in_place_of_base(base_of("bert"))
    path = stored[0] / "tokenizer.json"
    path.write_text(path.read_text().replace('"film"', '"movie"'))
    found = tokenizer_digest(stored[0])
    assert refusal(stored) == mismatch(stored, "tokenizer", own, found)


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("hidden_act", "relu", "hidden_act: then 'gelu', now 'relu'"),
        ("num_attention_heads", 4, "num_attention_heads: then 2, now 4"),
        ("num_hidden_layers", 2, "num_hidden_layers: then 3, now 2"),
    ],
)
def test_the_same_weights_under_another_config_are_refused(
    stored, in_place_of_base, base_of, key, value, line
):
    in_place_of_base(base_of("bert"))
    path = stored[0] / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    folder = stored[0]
    assert refusal(stored) == f"delta@v1: {folder} has another config than {folder} had: {line}"


def test_a_delta_that_says_nothing_of_the_config_still_loads(base_of, tmp_path):
    registry, folder = Registry(tmp_path), base_of("bert")
    method = tiny_runs.make_method(SECTIONS["lora"])
    delta = method.delta(tiny_runs.prepare(folder, method))
    info = tiny_runs.info_for(folder, method, delta).model_copy(update={"base_config": None})
    registry.save("delta", delta, info)
    assert load_delta("delta", registry=registry).stored.info.base_config is None


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_moved_base_comes_back_exactly_though_the_run_was_in_bf16(base_of, tmp_path, init):
    folder, registry = base_of("bert"), Registry(tmp_path)
    section = {"type": "lora", "r": 2, "init_lora_weights": init}
    model = trained_and_stored(folder, registry, section, "bf16")
    loaded = load_delta("delta", registry=registry)
    batch = tiny_runs.make_batch(folder, seed=99)
    expected, found = (tiny_runs.logits_of(m, batch) for m in (model, loaded.model))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_quantised_base_comes_back_quantised(base_of, tmp_path):
    registry = Registry(tmp_path)
    section = SECTIONS["qlora"] | {"quant_type": "fp4", "double_quant": False}
    trained_and_stored(base_of("bert"), registry, section)
    model = load_delta("delta", registry=registry).model
    states = [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
    assert len(states) == 18
    assert {(state.quant_type, state.nested) for state in states} == {("fp4", False)}


def test_a_changed_byte_of_the_delta_is_refused(base_of, tmp_path):
    registry = Registry(tmp_path)
    trained_and_stored(base_of("bert"), registry, SECTIONS["top_layers"])
    path = registry.find("delta").path / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        RegistryError, match=r"delta@v1 weights\.safetensors: .*: changed, expected sha256:"
    ):
        load_delta("delta", registry=registry)


def test_dropout_of_the_recipe_comes_back(base_of, tmp_path):
    registry, method = Registry(tmp_path), tiny_runs.make_method(SECTIONS["full"])
    model = tiny_runs.prepare(base_of("bert"), method, dropout=0.3)
    delta = method.delta(model)
    registry.save("delta", delta, tiny_runs.info_for(base_of("bert"), method, delta, dropout=0.3))
    loaded = load_delta("delta", registry=registry)
    assert loaded.model.config.hidden_dropout_prob == 0.3


def test_the_room_itself_loads_by_name(base_of, tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTKIT_REGISTRY", str(tmp_path))
    folder = base_of("bert")
    trained_and_stored(folder, Registry(tmp_path), SECTIONS["lora"])
    batch = tiny_runs.make_batch(folder)
    expected = tiny_runs.logits_of(load_delta("delta").model, batch)
    assert torch.equal(tiny_runs.logits_of(registry.load("delta").model, batch), expected)
