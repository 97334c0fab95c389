"""What the `peft` method accepts and refuses, beyond the contract."""

import pytest
import tiny_runs
from peft import PEFT_TYPE_TO_CONFIG_MAPPING
from pydantic import ValidationError

from peftkit.errors import MethodError
from peftkit.methods.peft import PeftConfig


def problem_of(section):
    with pytest.raises(ValidationError) as caught:
        tiny_runs.make_method({"type": "peft", **section})
    [problem] = caught.value.errors()
    return problem["msg"]


def test_an_unknown_type_is_refused_with_the_nearest_and_all():
    known = ", ".join(sorted(peft_type.value for peft_type in PEFT_TYPE_TO_CONFIG_MAPPING))
    assert problem_of({"peft_type": "LOHAA"}) == (
        f"Value error, peft_type 'LOHAA' is unknown; did you mean 'LOHA'? Choices: {known}"
    )


def test_unknown_keys_are_refused_with_the_nearest_and_all():
    message = problem_of({"peft_type": "IA3", "target_module": ["key"], "zzz": 1})
    choices = (
        "Choices: auto_mapping, exclude_modules, fan_in_fan_out, feedforward_modules, "
        "init_ia3_weights, modules_to_save, peft_type, peft_version, target_modules"
    )
    assert message == (
        "Value error, no keys of IA3Config: "
        f"'target_module' (did you mean 'target_modules'? {choices}); 'zzz' ({choices})"
    )


@pytest.mark.parametrize("key", ["task_type", "inference_mode", "base_model_name_or_path"])
def test_keys_that_peftkit_sets_are_refused(key):
    assert problem_of({"peft_type": "IA3", key: None}).startswith(
        f"Value error, no keys of IA3Config: '{key}' ("
    )


def test_targets_that_match_nothing_are_refused(base_of):
    method = tiny_runs.make_method(
        {"type": "peft", "peft_type": "LOHA", "target_modules": ["query", "w_q"]}
    )
    with pytest.raises(MethodError) as caught:
        tiny_runs.prepare(base_of("bert"), method)
    assert str(caught.value) == (
        "method: target_modules 'w_q' match no module; BertForSequenceClassification has: "
        "classifier, dense, key, position_embeddings, query, token_type_embeddings, value, "
        "word_embeddings"
    )


def test_what_peft_refuses_is_one_line(base_of):
    method = tiny_runs.make_method(
        {"type": "peft", "peft_type": "P_TUNING", "num_virtual_tokens": 3}
    )
    with pytest.raises(MethodError) as caught:
        tiny_runs.prepare(base_of("distilbert"), method)
    assert str(caught.value) == (
        "method: PEFT refuses it: Please specify `token_dim` in `peft_config`"
    )


def test_adalora_is_refused_because_nothing_would_move_its_ranks():
    with pytest.raises(ValidationError) as refused:
        PeftConfig(peft_type="ADALORA", r=4)
    assert "moves ranks between layers during training" in str(refused.value)


def test_lora_has_a_method_of_its_own():
    with pytest.raises(ValidationError) as refused:
        PeftConfig(peft_type="LORA", init_lora_weights="pissa")
    assert "peft_type 'LORA' has a method of its own; write type: lora" in str(refused.value)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        (
            "bert",
            {
                "peft_type": "TRAINABLE_TOKENS",
                "token_indices": [4, 5],
                "target_modules": ["word_embeddings"],
            },
        ),
        ("llama", {"peft_type": "ADAPTION_PROMPT", "adapter_len": 2, "adapter_layers": 1}),
    ],
)
def test_an_adapter_that_leaves_the_head_alone_is_refused(base_of, architecture, settings):
    method = tiny_runs.make_method({"type": "peft", **settings})
    with pytest.raises(MethodError) as caught:
        tiny_runs.prepare(base_of(architecture), method)
    head = {"bert": "classifier", "llama": "score"}[architecture]
    assert str(caught.value) == (
        f"method: peft_type {settings['peft_type']} does not train the head ({head}), "
        "so the task could not be learnt; take another"
    )
