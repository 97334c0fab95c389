"""Heads are averaged where they answer the same; else one parent's head is taken, with its task."""

from dataclasses import replace

import pytest
import tiny_runs
import torch
from stored_deltas import LORA, store

from peftkit.merging.checking import checked
from peftkit.registry.loading import load_delta
from peftkit.registry.store import Registry


def head_of(registry, name):
    delta = registry.read_delta(registry.find(name))
    return {
        key.removeprefix("base_model.model."): tensor
        for key, tensor in delta.tensors.items()
        if "classifier." in key
    }


@pytest.mark.parametrize("names", [["lora", "lora-other"], ["full", "lora"]])
@pytest.mark.parametrize("weights", [[0.5, 0.5], [3.0, 1.0], [1.5, -0.5]])
def test_equal_heads_are_averaged_by_the_weights(registry, combined, names, weights):
    combined(names, weights)
    first, second, found = (head_of(registry, name) for name in (*names, "out"))
    assert found.keys() == {"classifier.weight", "classifier.bias"}
    shares = [weight / sum(weights) for weight in weights]
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, shares[0] * first[key] + shares[1] * second[key])


@pytest.mark.parametrize("names", [["lora", "three"], ["full", "three"], ["full-three", "dora"]])
def test_a_head_is_taken_whole_with_its_task(registry, combined, base_of, names):
    for chosen in names:
        info = combined(names, [0.7, 0.7], head_from=chosen).info
        parent = registry.find(chosen).info
        own, found = head_of(registry, chosen), head_of(registry, "out")
        assert all(torch.equal(found[key], own[key]) for key in own)
        assert info.method["head_from"] == chosen
        same = ("task", "labels", "recipe", "recipe_digest", "data", "tokenizer_digest")
        assert all(getattr(info, key) == getattr(parent, key) for key in same)
        assert info.model["config"] == parent.model["config"]
        count = len(own["classifier.bias"])
        batch = tiny_runs.make_batch(base_of("bert"))
        assert tiny_runs.logits_of(load_delta("out", registry=registry).model, batch).shape == (
            8,
            count,
        )


def test_the_body_is_combined_whatever_the_head(registry, combined):
    averaged = registry.read_delta(combined(["lora", "lora-other"])).tensors
    taken = registry.read_delta(combined(["lora", "lora-other"], head_from="lora-other")).tensors
    bodies = [{k: t for k, t in one.items() if "classifier" not in k} for one in (averaged, taken)]
    assert bodies[0].keys() == bodies[1].keys()
    assert all(torch.equal(tensor, bodies[1][key]) for key, tensor in bodies[0].items())


def test_opposite_weights_subtract_a_body_under_a_chosen_head(combined):
    info = combined(["lora", "lora-other"], [1, -1], head_from="lora").info
    assert info.method["drift"]["relative_distance"] < 1e-6


@pytest.mark.slow
def test_what_the_chosen_heads_model_lacks_is_left_out_and_told(base_of, tmp_path):
    from peftkit.merging.combining import combine
    from peftkit.merging.plan import plan_from

    registry = Registry(tmp_path)
    store(registry, base_of("bert"), "classes", LORA)
    answers_questions(registry, base_of("bert"))
    plan = plan_from(["classes", "spans"], [], {"save_as": "out", "head_from": "spans"})
    found = combine(registry, plan)
    assert found.left_out == ["bert.pooler.dense.bias", "bert.pooler.dense.weight"]
    assert found.pairs()[-1] == (
        "left out",
        "bert.pooler.dense.bias, bert.pooler.dense.weight: not in the model of this head",
    )
    names = registry.read_delta(found.stored).tensors.keys()
    assert any("qa_outputs" in name for name in names)
    assert not any("pooler" in name or "classifier" in name for name in names)


def answers_questions(registry, folder):
    """Stores `spans`, a LoRA under a head for question answering."""
    from peftkit.modeling.loading import ModelSpec, load_model

    method = tiny_runs.make_method(LORA)
    torch.manual_seed(5)
    model = load_model(folder, ModelSpec("AutoModelForQuestionAnswering"), method.load_options())
    delta = method.delta(method.prepare(model))
    info = tiny_runs.info_for(folder, method, delta)
    about = {"auto_class": "AutoModelForQuestionAnswering", "config": {}}
    info = info.model_copy(update={"model": info.model | about, "labels": None})
    registry.save("spans", delta, info)


@pytest.mark.parametrize(
    "section", [LORA, {"type": "full"}, LORA | {"modules_to_save": ["pooler"]}]
)
def test_a_body_under_a_head_for_another_class_leaves_out_what_that_lacks(
    base_of, tmp_path, section
):
    from peftkit.merging.other_head import under_head
    from peftkit.registry.loading import on_base

    registry = Registry(tmp_path)
    store(registry, base_of("bert"), "classes", section, seed=3)
    answers_questions(registry, base_of("bert"))
    body, head = (registry.find(name) for name in ("classes", "spans"))
    pairs = [(stored.info, registry.read_delta(stored)) for stored in (body, head)]
    info, delta = under_head(base_of("bert"), *pairs)
    model = on_base(base_of("bert"), replace(head, info=info), delta).model
    found = dict(model.named_parameters())
    whole, spans = (pair[1].tensors for pair in pairs)
    place = "modules_to_save.default.weight" if delta.kind == "adapter" else "weight"
    (output,) = [p for name, p in found.items() if name.endswith(f"qa_outputs.{place}")]
    assert torch.equal(output, spans["base_model.model.qa_outputs.weight"])
    kept = {name for name in whole if "pooler" not in name and "classifier" not in name}
    assert kept < delta.tensors.keys()
    assert len(delta.tensors) == len(kept) + 2
    assert all(torch.equal(delta.tensors[name], whole[name]) for name in kept)


def test_a_head_that_is_not_the_average_is_noticed(registry, combined, monkeypatch):
    from peftkit.errors import RegistryError
    from peftkit.merging import combining

    def other_head(folder, info, delta, expected, *, exact):
        for key, tensor in delta.tensors.items():
            if "classifier" in key:
                tensor += 0.1
        return checked(folder, info, delta, expected, exact=exact)

    monkeypatch.setattr(combining, "checked", other_head)
    with pytest.raises(RegistryError, match=r"^verification: the result answers differently"):
        combined(["lora", "lora-other"])
