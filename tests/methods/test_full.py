"""Layer-wise decay of the learning rate; the rest of `full` is in the contract."""

import pytest
import tiny_runs

TOP = {
    "bert": ["bert.pooler.dense.bias", "classifier.weight"],
    "gpt2": ["transformer.ln_f.weight", "score.weight"],
    "llama": ["model.norm.weight", "score.weight"],
    "distilbert": ["pre_classifier.bias", "classifier.weight"],
}
BOTTOM = {
    "bert": "bert.embeddings.LayerNorm.bias",
    "gpt2": "transformer.wpe.weight",
    "llama": "model.embed_tokens.weight",
    "distilbert": "distilbert.embeddings.word_embeddings.weight",
}
BLOCK = {
    "bert": "bert.encoder.layer.{}.output.dense.weight",
    "gpt2": "transformer.h.{}.mlp.c_fc.weight",
    "llama": "model.layers.{}.mlp.up_proj.weight",
    "distilbert": "distilbert.transformer.layer.{}.ffn.lin1.weight",
}


@pytest.mark.parametrize("architecture", sorted(TOP))
def test_each_block_trains_at_a_fraction_of_the_rate_above_it(base_of, architecture):
    method = tiny_runs.make_method({"type": "full", "layerwise_lr_decay": 0.5})
    model = tiny_runs.prepare(base_of(architecture), method)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {
        names[id(p)]: group.learning_rate
        for group in method.parameter_groups(model, 0.32)
        for p in group.parameters
    }
    expected = dict.fromkeys(TOP[architecture], 0.32)
    expected |= {BLOCK[architecture].format(i): 0.32 * 0.5 ** (3 - i) for i in range(3)}
    expected[BOTTOM[architecture]] = 0.32 * 0.5**4
    assert {name: rates[name] for name in expected} == expected


def test_without_decay_there_is_one_rate(base_of):
    method = tiny_runs.make_method({"type": "full"})
    model = tiny_runs.prepare(base_of("bert"), method)
    assert [group.learning_rate for group in method.parameter_groups(model, 0.32)] == [0.32]
