"""The base of `qlora` is in 4 bits where it should be, and stays as it was loaded."""

import bitsandbytes
import pytest
import tiny_runs
import torch
from bitsandbytes.nn import Linear4bit
from pydantic import ValidationError

from peftkit.modeling import loading


def qlora(**keys):
    return tiny_runs.make_method({"type": "qlora", "r": 2, **keys})


def quantised(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}


@pytest.mark.parametrize(
    ("architecture", "count"), [("bert", 18), ("roberta", 18), ("distilbert", 18), ("llama", 21)]
)
def test_blocks_are_in_four_bits_and_heads_and_poolers_are_not(base_of, architecture, count):
    model = tiny_runs.load_base(base_of(architecture), qlora())
    names = quantised(model)
    assert len(names) == count
    assert [name for name in names if ".layer" not in name] == []
    plain = {n for n, m in model.named_modules() if type(m) is torch.nn.Linear}
    expected = {
        "bert": {"bert.pooler.dense", "classifier"},
        "roberta": {"classifier.dense", "classifier.out_proj"},
        "distilbert": {"pre_classifier", "classifier"},
        "llama": {"score"},
    }
    assert plain == expected[architecture]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, ("nf4", True, torch.float32)),
        ({"quant_type": "fp4", "double_quant": False}, ("fp4", False, torch.float32)),
        ({"compute_dtype": "bfloat16"}, ("nf4", True, torch.bfloat16)),
    ],
)
def test_the_quantisation_is_what_the_recipe_says(base_of, keys, expected):
    for layer in quantised(tiny_runs.load_base(base_of("bert"), qlora(**keys))).values():
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, layer.compute_dtype) == expected
        assert layer.weight.dtype == torch.uint8


def test_products_are_computed_in_the_precision_of_the_run(base_of):
    model = tiny_runs.load_base(base_of("bert"), qlora(), mixed_precision="bf16")
    assert {layer.compute_dtype for layer in quantised(model).values()} == {torch.bfloat16}


def test_an_initialisation_that_moves_the_base_is_refused():
    with pytest.raises(ValidationError) as caught:
        qlora(init_lora_weights="pissa")
    [problem] = caught.value.errors()
    assert problem["msg"] == (
        "Value error, init_lora_weights: pissa changes the base's weights, which qlora holds in "
        "4 bits; use true, gaussian or orthogonal"
    )


@pytest.fixture
def repacking_cpu(monkeypatch):
    """As on a CPU with AVX512-BF16, where an eval forward repacks 4-bit weights in place."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)


@pytest.fixture
def wide_base(base_of):
    """Repacking needs a width of whole blocks of 64."""
    return base_of("bert", width=64, depth=1)


def eval_forward_keeps_bytes(folder):
    method = qlora()
    model = tiny_runs.prepare(folder, method)
    before = {name: m.weight.data.clone() for name, m in quantised(model).items()}
    try:
        tiny_runs.logits_of(model, tiny_runs.make_batch(folder))
    except RuntimeError:  # the repacked weight, on a CPU that cannot use it
        return False
    assert len(before) == 6
    layers = quantised(model)
    return all(torch.equal(layers[name].weight.data, old) for name, old in before.items())


def test_an_evaluation_does_not_touch_the_weights(wide_base, repacking_cpu):
    assert eval_forward_keeps_bytes(wide_base)


def test_without_the_guard_an_evaluation_repacks_the_weights(wide_base, repacking_cpu, monkeypatch):
    monkeypatch.setattr(loading, "keep_cpu_weights_unpacked", lambda model: None)
    assert not eval_forward_keeps_bytes(wide_base)
