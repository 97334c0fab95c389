"""A language model whose output embedding is its input embedding survives a merge, or has none."""

import shutil

import pytest
import stored_deltas
import tiny_runs
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peftkit.contracts import Delta
from peftkit.errors import RegistryError
from peftkit.merging import folding
from peftkit.merging.into_base import MergeOptions, merge_into_base
from peftkit.modeling.deltas import adapter_delta
from peftkit.registry import Registry

pytestmark = [
    # PEFT's own warnings: of transformers' new names, and of tied targets.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`"),
]

SIZES = {
    "vocab_size": 22,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


@pytest.fixture
def registry(tmp_path) -> Registry:
    return Registry(tmp_path / "store")


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request, tmp_path, base_of):
    shutil.copytree(base_of("llama"), tmp_path / "base")  # for its tokenizer
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, tie_word_embeddings=request.param)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base", request.param


def stored_lora(registry, folder, **settings):
    """A LoRA with random factors on a causal language model."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    adapted = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    delta = adapter_delta(adapted)
    registry.save("d", delta, causal(folder, delta))
    return adapted.eval()


def causal(folder, delta):
    info = tiny_runs.info_for(folder, tiny_runs.make_method(stored_deltas.LORA), delta)
    model = info.model | {"auto_class": "AutoModelForCausalLM", "config": {}}
    return info.model_copy(update={"model": model, "labels": None})


def distance(merged, model):
    ids = torch.arange(4, 20).reshape(2, 8)
    found = AutoModelForCausalLM.from_pretrained(merged.folder).eval()
    with torch.no_grad():
        return float((found(ids).logits - model(ids).logits).abs().max())


def test_adapters_inside_the_blocks_leave_the_embeddings_alone(base, registry, tmp_path):
    folder, tied = base
    model = stored_lora(registry, folder, target_modules=["q_proj", "down_proj"])
    merged = merge_into_base(registry, "d", tmp_path / "merged", MergeOptions())
    assert distance(merged, model) <= 1e-5
    found = AutoModelForCausalLM.from_pretrained(merged.folder)
    shared = found.lm_head.weight.data_ptr() == found.model.embed_tokens.weight.data_ptr()
    assert shared == tied


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_one_of_two_tied_embeddings_is_refused(base, registry, tmp_path, target):
    folder, tied = base
    model = stored_lora(registry, folder, target_modules=["q_proj", target])
    if not tied:
        merged = merge_into_base(registry, "d", tmp_path / "merged", MergeOptions())
        assert distance(merged, model) <= 1e-5
        return
    with pytest.raises(RegistryError) as caught:
        merge_into_base(registry, "d", tmp_path / "merged", MergeOptions())
    changed = {"lm_head": "lm_head.weight", "embed_tokens": "model.embed_tokens.weight"}
    assert caught.value.problems == [
        "lm_head.weight: shares its memory with model.embed_tokens.weight, and the delta changes "
        f"only {changed[target]}; it cannot be folded into this base"
    ]
    assert not (tmp_path / "merged").exists()


def test_without_the_guard_the_verification_finds_the_lost_half(
    base, registry, tmp_path, monkeypatch
):
    folder, tied = base
    if not tied:
        pytest.skip("nothing is lost where nothing is tied")
    stored_lora(registry, folder, target_modules=["q_proj", "embed_tokens"])
    monkeypatch.setattr(folding.Fold, "_refuse_loosened_ties", lambda self: None)
    with pytest.raises(RegistryError, match="verification: "):
        merge_into_base(registry, "d", tmp_path / "merged", MergeOptions())
    assert not (tmp_path / "merged").exists()


def test_a_full_fine_tune_of_a_tied_model_is_merged(base, registry, tmp_path):
    folder, _ = base
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    delta = Delta("weights", {name: p.detach().clone() for name, p in model.named_parameters()})
    registry.save("d", delta, causal(folder, delta), base=folder)
    merged = merge_into_base(registry, "d", tmp_path / "merged", MergeOptions())
    assert distance(merged, model) == 0.0
