"""Heads, blocks, precision and counts, over architectures."""

import pytest
import tiny_runs
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from peftkit.errors import MethodError
from peftkit.modeling.parameters import (
    count_parameters,
    head_modules,
    layer_depths,
    pooler_modules,
    train_mode,
    transformer_blocks,
)

HEADS = {
    "bert": ["classifier"],
    "roberta": ["classifier"],
    "distilbert": ["classifier", "pre_classifier"],
    "gpt2": ["score"],
    "llama": ["score"],
}
FULL = {"type": "full"}
LORA = {"type": "lora", "r": 2, "target_modules": "all-linear"}
TOP = {"type": "top_layers", "num_layers": 1}
QLORA = {"type": "qlora", "r": 2}
IA3 = {"type": "peft", "peft_type": "IA3"}
P_TUNING = {"type": "peft", "peft_type": "P_TUNING", "num_virtual_tokens": 2}


def loaded(folder, section=FULL):
    return tiny_runs.load_base(folder, tiny_runs.make_method(section))


@pytest.mark.parametrize("architecture", sorted(HEADS))
def test_the_head_is_what_stands_outside_the_base(base_of, architecture):
    assert head_modules(loaded(base_of(architecture))) == HEADS[architecture]


@pytest.mark.parametrize("architecture", sorted(HEADS))
def test_blocks_are_found_by_the_depth_of_the_config(base_of, architecture):
    blocks = transformer_blocks(loaded(base_of(architecture, depth=2)))
    assert len(blocks) == 2
    assert len({type(block) for block in blocks}) == 1


def test_a_model_without_a_list_of_blocks_is_refused(base_of):
    model = loaded(base_of("bert"))
    model.config.num_hidden_layers = 5
    with pytest.raises(MethodError) as caught:
        transformer_blocks(model)
    assert str(caught.value) == (
        "method: BertForSequenceClassification has no single list of 5 equal blocks to count "
        "layers in"
    )


SIZES = {
    "bart": {
        "d_model": 16,
        "encoder_layers": 3,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
    },
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 3, "num_heads": 2},
    "flaubert": {"emb_dim": 16, "n_layers": 3, "n_heads": 2},
}


@pytest.mark.parametrize("model_type", sorted(SIZES))
def test_a_model_of_more_than_one_stack_is_refused(model_type):
    config = AutoConfig.for_model(model_type, vocab_size=22, **SIZES[model_type])
    model = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(MethodError, match=r"has no single list of \d equal blocks to count layers"):
        transformer_blocks(model)


@pytest.mark.parametrize("architecture", sorted(HEADS))
def test_every_parameter_has_a_depth(base_of, architecture):
    model = loaded(base_of(architecture))
    depths = layer_depths(model)
    assert depths.keys() == {name for name, _ in model.named_parameters()}
    assert set(depths.values()) == {0, 1, 2, 3, 4}
    assert {depth for name, depth in depths.items() if "embed" in name} <= {0}


def test_poolers_are_found_by_name(base_of):
    assert [len(pooler_modules(loaded(base_of(a)))) for a in ("bert", "roberta", "llama")] == [
        1,
        0,
        0,
    ]


def dtypes(model):
    """Dtypes of (frozen, trainable) floating-point parameters, and of the others."""
    floating = [p for p in model.parameters() if p.is_floating_point()]
    return (
        {p.dtype for p in floating if not p.requires_grad},
        {p.dtype for p in floating if p.requires_grad},
        {p.dtype for p in model.parameters() if not p.is_floating_point()},
    )


F32, BF16 = {torch.float32}, {torch.bfloat16}


@pytest.mark.parametrize(
    ("section", "frozen"),
    [
        (FULL, [set(), set()]),
        (TOP, [F32, BF16]),
        (LORA, [F32, BF16]),
        (LORA | {"use_dora": True}, [F32, BF16]),
        (LORA | {"init_lora_weights": "pissa"}, [F32, F32]),
        (QLORA, [F32, BF16]),
        (IA3, [F32, BF16]),
        (P_TUNING, [F32, BF16]),
    ],
)
def test_what_trains_is_float32_and_what_is_frozen_is_as_the_run(base_of, section, frozen):
    method = tiny_runs.make_method(section)
    for precision, expected in zip(["no", "bf16"], frozen, strict=True):
        model = tiny_runs.prepare(base_of("bert"), method, mixed_precision=precision)
        integers = {torch.uint8} if section is QLORA else set()
        assert dtypes(model) == (expected, F32, integers)


@pytest.mark.parametrize("section", [FULL, TOP, LORA, QLORA])
def test_in_fp16_no_method_trains_a_weight_of_16_bits(base_of, section):
    method = tiny_runs.make_method(section)
    model = tiny_runs.prepare(base_of("bert"), method, mixed_precision="fp16")
    frozen, trained, _ = dtypes(model)
    assert trained == F32
    assert frozen == (set() if section is FULL else {torch.float16})


def test_a_norm_is_held_in_one_dtype(base_of):
    method = tiny_runs.make_method(LORA | {"bias": "all"})
    model = tiny_runs.prepare(base_of("bert"), method, mixed_precision="bf16")
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 7
    assert {m.weight.dtype for m in norms} == F32
    embedding = model.base_model.model.bert.embeddings.word_embeddings
    assert embedding.weight.dtype == torch.bfloat16
    query = model.base_model.model.bert.encoder.layer[0].attention.self.query
    assert {query.base_layer.weight.dtype} == BF16
    assert {query.base_layer.bias.dtype} == F32
    # In two dtypes the norm would not compute at all on a CPU.
    tiny_runs.train(model, method, base_of("bert"), mixed_precision="bf16")


@pytest.mark.parametrize(
    ("model_type", "embedding"),
    [("bert", "word_embeddings"), ("gpt2", "wte"), ("llama", "embed_tokens")],
)
def test_a_trained_embedding_hands_on_what_the_frozen_model_is_held_in(
    base_of, model_type, embedding
):
    method = tiny_runs.make_method(LORA | {"modules_to_save": [embedding]})
    model = tiny_runs.prepare(base_of(model_type), method, mixed_precision="bf16")
    name = f"{embedding}.modules_to_save.default"
    trained = next(m for n, m in model.named_modules() if n.endswith(name))
    assert trained.weight.dtype == torch.float32
    assert trained(torch.tensor([5])).dtype == torch.bfloat16
    before = trained.weight.detach().clone()
    tiny_runs.train(model, method, base_of(model_type), mixed_precision="bf16")
    assert not torch.equal(trained.weight, before)


def test_an_embedding_among_trained_modules_stays_float32(base_of):
    model = tiny_runs.prepare(base_of("bert"), tiny_runs.make_method(FULL), mixed_precision="bf16")
    assert model.bert.embeddings.word_embeddings(torch.tensor([5])).dtype == torch.float32


def test_counts_are_of_elements(base_of):
    model = loaded(base_of("bert"))
    total = sum(p.numel() for p in model.parameters())
    assert count_parameters(model) == (total, total)
    lora = tiny_runs.prepare(base_of("bert"), tiny_runs.make_method(LORA))
    # Per block: five (16 -> 16), (16 -> 32) and (32 -> 16) at rank 2; the pooler; head of 34.
    adapters = 3 * (4 * 2 * 32 + 2 * 2 * 48) + 2 * 32
    # PEFT keeps the untrained head beside the trained one.
    assert count_parameters(lora) == (adapters + 34, total + adapters + 34)


def test_a_weight_in_four_bits_counts_as_unpacked(base_of):
    plain = tiny_runs.prepare(base_of("bert"), tiny_runs.make_method(LORA))
    packed = tiny_runs.prepare(base_of("bert"), tiny_runs.make_method(QLORA))
    assert count_parameters(packed) == count_parameters(plain)


def test_train_mode_without_exemptions_is_all_of_the_model(base_of):
    model = loaded(base_of("bert")).eval()
    train_mode(model)
    assert all(module.training for module in model.modules())
