"""What keeps deltas from being combined is told before anything is loaded, all of it at once."""

import pytest
from stored_deltas import LORA, QLORA, store

from peftkit.errors import RegistryError
from peftkit.merging.combining import combine
from peftkit.merging.plan import plan_from
from peftkit.registry.store import Registry

ONLY = "only deltas over one base can be combined"
OTHERS = "linear, ties, dare_linear, dare_ties, magnitude_prune"


def refused(registry, names, weights=(), **options):
    plan = plan_from(names, weights, {"save_as": "never"} | options)
    with pytest.raises(RegistryError) as caught:
        combine(registry, plan)
    assert "never" not in {row["name"] for row in registry.ls().rows}
    return caught.value.problems


def test_the_same_delta_under_two_names(registry):
    assert refused(registry, ["lora", "lora@v1"]) == [
        "lora@v1: the same delta as lora; name each once"
    ]


def test_a_delta_that_is_not_there(registry):
    (line,) = refused(registry, ["lora", "lorra"])
    assert line.startswith(f"{registry.root}: no delta 'lorra'; did you mean 'lora'? Choices: ")


@pytest.fixture(scope="module")
def apart(base_of, tmp_path_factory):
    """LoRA deltas over bases that differ in one thing each."""
    registry = Registry(tmp_path_factory.mktemp("apart"))
    store(registry, base_of("bert"), "first", LORA)
    store(registry, base_of("bert", seed=7), "weights", LORA)
    store(registry, base_of("bert"), "tokenizer", LORA, tokenizer_digest="sha256:" + "1" * 64)
    config = registry.find("first").info.base_config | {"hidden_act": "relu"}
    store(registry, base_of("bert"), "config", LORA, base_config=config)
    store(registry, base_of("bert"), "nf4", QLORA)
    store(registry, base_of("bert"), "bf16", LORA, precision="bf16")
    store(registry, base_of("bert"), "nf4-dora", QLORA | {"use_dora": True}, seed=3)
    return registry


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("weights", "weights {found.base_digest}, that of first@v1 has {first.base_digest}"),
        (
            "tokenizer",
            "tokenizer {found.tokenizer_digest}, that of first@v1 has {first.tokenizer_digest}",
        ),
        ("config", "config {found.base_config}, that of first@v1 has {first.base_config}"),
        ("nf4", "quantisation nf4 (double_quant True), that of first@v1 has none"),
        (
            "bf16",
            "precision bfloat16 (mixed precision bf16), "
            "that of first@v1 has float32 (mixed precision no)",
        ),
    ],
)
def test_another_base(apart, name, what):
    infos = {"first": apart.find("first").info, "found": apart.find(name).info}
    line = f"{name}@v1: its base has {what.format(**infos)}; {ONLY}"
    assert refused(apart, ["first", name]) == [line]


def test_all_problems_of_all_deltas_at_once(apart):
    lines = refused(apart, ["first", "nf4", "bf16", "first@v1", "absent"])
    assert [line.partition(":")[0] for line in lines[1:]] == ["first@v1", "nf4@v1", "bf16@v1"]
    assert lines[0].startswith(f"{apart.root}: no delta 'absent'")


@pytest.mark.parametrize("word", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_factors_of_other_ranks(registry, word):
    options = {} if word == "linear" else {"density": 0.5}
    assert refused(registry, ["lora", "rank-3", "patterns"], combine=word, **options) == [
        f"rank-3@v1: rank 3 in bert.encoder.layer.0.attention.self.query, lora@v1 has 2; '{word}' "
        "adds factors of one rank only, so take cat or svd",
        "patterns@v1: rank 4 in bert.encoder.layer.0.attention.self.query, lora@v1 has 2; "
        f"'{word}' adds factors of one rank only, so take cat or svd",
    ]


@pytest.mark.parametrize("word", ["cat", "svd", "ties_svd"])
def test_factors_that_are_no_plain_lora(registry, word):
    options = {"density": 0.5} if word == "ties_svd" else {}
    names = ["lora", "dora", "ia3", "full", "lora-biases", "lora-tokens"]
    assert refused(registry, names, combine=word, **options) == [
        f"combine: '{word}' joins the factors of plain LoRA deltas, and dora@v1 is a LoRA with "
        "use_dora True; ia3@v1 is IA3; full@v1 is of kind weights; lora-biases@v1 is a LoRA with "
        "bias 'all'; lora-tokens@v1 is a LoRA with trainable_token_indices [4, 5]; take linear, "
        f"which adds the changed weights exactly, or another of {OTHERS}"
    ]


def test_factors_beside_a_module_that_is_saved_whole(registry):
    assert refused(registry, ["lora", "saved"], combine="cat") == [
        "combine: 'cat' joins the factors of plain LoRA deltas, and what one of them adapts, "
        "another saves whole; take linear, which adds the changed weights exactly, or another of "
        f"{OTHERS}"
    ]


def test_prompts(registry):
    line = (
        "prefix@v1: PREFIX_TUNING works beside the base's weights, so there is nothing that could "
        "be combined"
    )
    assert refused(registry, ["lora", "prefix"]) == [line]
    assert refused(registry, ["lora", "prefix"], combine="cat") == [line]


def test_changed_weights_over_a_base_in_4_bits(apart):
    assert refused(apart, ["nf4", "nf4-dora"]) == [
        f"{name}@v1: its base is held in 4 bits, where changed weights have no place; combine "
        "plain LoRA deltas over it, by cat or svd"
        for name in ("nf4", "nf4-dora")
    ]


HEAD = "AutoModelForSequenceClassification for negative, positive"
SAY = "only equal heads are averaged, so name the delta whose head the result takes with head_from"


def test_other_heads(registry):
    assert refused(registry, ["lora", "three", "full-three"]) == [
        f"{name}@v1: its head is {HEAD} (3 outputs, None), that of lora@v1 is {HEAD} "
        f"(2 outputs, None); {SAY}"
        for name in ("three", "full-three")
    ]


def test_other_labels(base_of, tmp_path):
    registry = Registry(tmp_path)
    store(registry, base_of("bert"), "one", LORA)
    stored = store(registry, base_of("bert"), "two", LORA, seed=1)
    about = stored.info.model_copy(update={"labels": ["no", "yes"]})
    registry.save("swapped", registry.read_delta(stored), about)
    assert refused(registry, ["one", "swapped"]) == [
        "swapped@v1: its head is AutoModelForSequenceClassification for no, yes (2 outputs, None), "
        f"that of one@v1 is {HEAD} (2 outputs, None); {SAY}"
    ]


def test_weights_that_leave_no_average_of_the_heads(registry):
    assert refused(registry, ["lora", "lora-other"], [1, -1]) == [
        "weights: their sum is 0, so that the heads have no average; name the delta whose head "
        "the result takes with head_from"
    ]
