"""What `lora` accepts, refuses and stores, beyond the contract."""

import pytest
import tiny_runs
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import ValidationError

from peftkit.errors import MethodError
from peftkit.methods.lora import LoraConfig

BERT_LAYERS = (
    "classifier, dense, key, position_embeddings, query, token_type_embeddings, value, "
    "word_embeddings"
)


def lora(**keys):
    return tiny_runs.make_method({"type": "lora", "r": 2, **keys})


@pytest.mark.parametrize(
    ("targets", "named", "hint"),
    [
        (["q_proj", "v_proj"], "'q_proj', 'v_proj'", ""),
        (["query", "v_proj"], "'v_proj'", ""),
        (["uery"], "'uery'", "did you mean 'query'? "),
        ("all_linear", "'all_linear'", "did you mean 'all-linear'? "),
        (r".*\.q_proj", r"'.*\\.q_proj'", ""),
        ("query", "'query'", "write [query] for all names that end in it; "),
    ],
)
def test_targets_that_match_nothing_are_refused(base_of, targets, named, hint):
    with pytest.raises(MethodError) as caught:
        tiny_runs.prepare(base_of("bert"), lora(target_modules=targets))
    assert str(caught.value) == (
        f"method: target_modules {named} match no module; {hint}"
        f"BertForSequenceClassification has: {BERT_LAYERS}"
    )


def test_all_linear_adapts_every_linear_layer_outside_the_head(base_of):
    model = tiny_runs.prepare(base_of("distilbert"), lora())
    adapted = {n for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    layers = ["attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"]
    layers += ["ffn.lin1", "ffn.lin2"]
    prefix = "base_model.model.distilbert.transformer.layer"
    assert adapted == {f"{prefix}.{i}.{layer}" for i in range(3) for layer in layers}


def test_what_peft_refuses_is_one_line(base_of):
    with pytest.raises(MethodError) as caught:
        tiny_runs.prepare(base_of("bert"), lora(init_lora_weights="olora", lora_bias=True))
    [line] = str(caught.value).splitlines()
    assert line == (
        "method: PEFT refuses it: The argument lora_bias=True is only supported with "
        "init_lora_weights=True or False, got init_lora_weights=olora instead."
    )


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("other", ["use_dora", "use_rslora"])
def test_a_moved_base_goes_with_plain_scaling_only(init, other):
    with pytest.raises(ValidationError) as caught:
        lora(init_lora_weights=init, **{other: True})
    [problem] = caught.value.errors()
    assert problem["msg"] == (
        f"Value error, init_lora_weights: {init} changes the base's weights and is stored as "
        "plain LoRA, which use_dora and use_rslora do not allow"
    )


@pytest.mark.parametrize("init", ["pisa", "loftq", "eva", "pissa_niter_0", "pissa_niter_"])
def test_an_unknown_initialisation_is_refused(init):
    with pytest.raises(ValidationError) as caught:
        lora(init_lora_weights=init)
    [problem] = caught.value.errors()
    assert problem["msg"] == (
        f"Value error, '{init}' is unknown; allowed: true, false, gaussian, orthogonal, olora, "
        "pissa, pissa_niter_<n> (others need calibration data)"
    )


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_initialisation_moves_the_base_and_not_the_model(base_of, init):
    folder, method = base_of("bert"), lora(init_lora_weights=init)
    base = tiny_runs.load_base(folder, method)
    batch = tiny_runs.make_batch(folder)
    expected = tiny_runs.logits_of(base, batch)
    layer = base.bert.encoder.layer[0].attention.self.query
    before = layer.weight.detach().clone()
    model = method.prepare(base)
    assert not torch.equal(layer.weight, before)
    torch.testing.assert_close(tiny_runs.logits_of(model, batch), expected, rtol=0, atol=1e-5)


def test_a_moved_base_is_stored_as_twice_the_rank_over_the_first_base(base_of):
    method = lora(init_lora_weights="pissa", rank_pattern={"key": 3}, alpha_pattern={"value": 5})
    stored = method.delta(tiny_runs.prepare(base_of("bert"), method)).adapter_config
    kept = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights")
    assert [stored[key] for key in kept] == [4, 32, {"key": 6}, {"value": 10}, True]


def test_b_matrices_train_at_a_rate_of_their_own(base_of):
    method = lora(loraplus_lr_ratio=8.0, target_modules=["query", "word_embeddings"])
    model = tiny_runs.prepare(base_of("bert"), method)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {
        names[id(p)]: group.learning_rate
        for group in method.parameter_groups(model, 0.125)
        for p in group.parameters
    }
    b_matrices = {name for name in rates if ".lora_B." in name or ".lora_embedding_B." in name}
    assert len(b_matrices) == 4
    assert {name for name, rate in rates.items() if rate == 1.0} == b_matrices
    assert {rate for name, rate in rates.items() if name not in b_matrices} == {0.125}


def test_an_adapter_that_could_not_be_saved_whole_is_refused_before_training(base_of, monkeypatch):
    import peft

    true = peft.get_peft_model_state_dict

    def forgetful(model, **settings):
        return {k: v for k, v in true(model, **settings).items() if "classifier" not in k}

    monkeypatch.setattr(peft, "get_peft_model_state_dict", forgetful)
    with pytest.raises(MethodError) as caught:
        tiny_runs.prepare(base_of("bert"), lora())
    head = "base_model.model.classifier.modules_to_save.default"
    assert str(caught.value) == (
        f"method: trained but not part of the adapter's files: {head}.weight, {head}.bias"
    )


def test_an_unknown_key_is_refused():
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        lora(aplha=3)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_modules", "*.query"),
        ("exclude_modules", "*.query"),
        ("rank_pattern", {"*.query": 4}),
        ("layers_pattern", "("),
        ("modules_to_save", ["["]),
    ],
)
def test_a_broken_expression_is_refused_in_the_recipe(key, value):
    with pytest.raises(ValidationError) as refused:
        LoraConfig(**{key: value})
    assert "is no regular expression: " in str(refused.value)
