"""A combined delta is a weighted sum where its method is exact, and verified before it exists."""

import pytest
import tiny_runs
import torch
from sums import distance, logits_with, weighted_sum

from peftkit.errors import RegistryError
from peftkit.merging import checking, lora_combination
from peftkit.merging.plan import ON_FACTORS, decomposes, prunes
from peftkit.registry.loading import load_delta
from peftkit.registry.shared import SharedBase
from peftkit.registry.store import Registry

EXACT = {
    "cat": ["lora", "lora-other"],
    "ranks": ["lora", "rank-3", "patterns"],
    "scalings": ["rslora", "lora", "lora-other"],
    "layers": ["high", "expression", "lora"],
    "embeddings": ["lora-embeddings", "lora"],
    "saved": ["saved", "saved-other"],
    "saved-in-one": ["saved", "body"],
}
WEIGHTS = [0.5, -0.3, 1.2]


def logits(registry, name, folder):
    """Computed in float64, so that only the weights can differ."""
    model = load_delta(name, registry=registry).model.double()
    return tiny_runs.logits_of(model, tiny_runs.make_batch(folder, seed=99))


@pytest.mark.slow
@pytest.mark.parametrize("combine", ["cat", "svd"])
@pytest.mark.parametrize("names", EXACT.values(), ids=EXACT.keys())
def test_cat_and_svd_of_full_rank_are_the_weighted_sum(
    registry, combined, merged_weights, base_weights, base_of, names, combine
):
    weights = WEIGHTS[: len(names)]
    stored = combined(names, weights, combine=combine)
    expected = weighted_sum(base_weights, [merged_weights(name) for name in names], weights)
    assert distance(merged_weights("out"), expected, base_weights) < 1e-6
    truth = logits_with(base_of("bert"), expected, tiny_runs.make_batch(base_of("bert"), seed=99))
    torch.testing.assert_close(logits(registry, "out", base_of("bert")), truth, rtol=0, atol=1e-6)
    assert stored.info.kind == "adapter"
    assert stored.info.verification.bound == "max |Δlogit| ≤ 1e-05, top-1 equal"
    assert stored.info.method["drift"]["relative_distance"] < 1e-6


def test_cat_is_the_weighted_sum(combined, merged_weights, base_weights):
    combined(["lora", "rank-3"], [0.5, -0.3])
    parents = [merged_weights(name) for name in ("lora", "rank-3")]
    expected = weighted_sum(base_weights, parents, [0.5, -0.3])
    assert distance(merged_weights("out"), expected, base_weights) < 1e-6


MIXTURES = {
    "every kind": ["full", "top_layers", "lora", "dora", "ia3", "vera"],
    "biases and tokens": ["lora-biases", "lora-own-biases", "lora-tokens"],
    "weights": ["full", "full-other"],
    "saved whole and adapted": ["saved", "lora"],
}


@pytest.mark.parametrize("names", MIXTURES.values(), ids=MIXTURES.keys())
def test_task_arithmetic_of_any_kinds_is_the_weighted_sum(
    registry, combined, merged_weights, base_weights, base_of, names
):
    weights = [0.4, 0.3, -0.2, 0.5, 0.1, 0.25][: len(names)]
    stored = combined(names, weights)
    expected = weighted_sum(base_weights, [merged_weights(name) for name in names], weights)
    assert distance(merged_weights("out"), expected, base_weights) < 1e-6
    truth = logits_with(base_of("bert"), expected, tiny_runs.make_batch(base_of("bert"), seed=99))
    torch.testing.assert_close(logits(registry, "out", base_of("bert")), truth, rtol=0, atol=1e-6)
    assert (stored.info.kind, stored.info.method["combine"]) == ("weights", "linear")


@pytest.mark.slow
def test_only_what_some_delta_changes_is_in_the_result(registry, combined):
    stored = combined(["lora", "dora"])
    names = registry.read_delta(stored).tensors.keys()
    assert not [name for name in names if name.endswith("bias") and "classifier" not in name]
    assert "bert.embeddings.word_embeddings.weight" not in names


@pytest.mark.slow
@pytest.mark.parametrize("combine", ON_FACTORS)
def test_every_word_makes_a_delta_that_is_loaded_and_attached(registry, combined, base_of, combine):
    density = {"density": 0.5} if prunes(combine) else {}
    stored = combined(["lora", "lora-other"], [0.5, 0.3], combine=combine, **density)
    assert stored.info.kind == "adapter"
    batch = tiny_runs.make_batch(base_of("bert"), seed=99)
    alone = tiny_runs.logits_of(load_delta("out", registry=registry).model, batch)
    shared = SharedBase(base_of("bert"), registry)
    shared.attach("out")
    with shared.using("out"):
        assert torch.equal(shared(batch), alone)
    registry.verify(stored)


@pytest.mark.slow
@pytest.mark.parametrize("combine", [word for word in ON_FACTORS if "dare" not in word])
def test_the_factors_are_those_that_peft_makes_of_a_whole_model(
    registry, combined, base_of, combine
):
    density = {"density": 0.5} if prunes(combine) else {}
    combined(["body", "body-other"], [0.5, -0.3], combine=combine, **density)
    expected = through_whole_model(registry, ["body", "body-other"], combine, density)
    found = load_delta("out", registry=registry).model
    for name, layer in lora_layers(found):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(b @ a * layer.scaling["default"], expected[name])


def lora_layers(model):
    from peft.tuners.lora import LoraLayer

    return [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]


def through_whole_model(registry, names, combine, density):
    """Layer → B·A as PEFT combines adapters that are loaded side by side."""
    from peft import LoraConfig

    model = load_delta(names[0], registry=registry).model
    config = LoraConfig(r=2, lora_alpha=16, target_modules=["query", "value"])
    model.base_model.peft_config["other"] = config
    model.base_model.inject_adapter(model.base_model.model, "other")
    second = dict(lora_layers(load_delta(names[1], registry=registry).model))
    for name, layer in lora_layers(model):
        layer.lora_A["other"].weight.data = second[name].lora_A["default"].weight.data
        layer.lora_B["other"].weight.data = second[name].lora_B["default"].weight.data
    rank = {"svd_rank": 4} if decomposes(combine) else {}
    model.base_model.add_weighted_adapter(
        ["default", "other"], [0.5, -0.3], "both", combination_type=combine, **density, **rank
    )
    return {name: layer.get_delta_weight("both") for name, layer in lora_layers(model)}


@pytest.mark.parametrize("combine", ["ties", "magnitude_prune", "dare_linear", "dare_ties"])
def test_weights_are_combined_by_pefts_functions(
    registry, combined, merged_weights, base_weights, combine
):
    from peft.utils import merge_utils

    names, weights = ["full", "lora", "top_layers"], torch.tensor([0.5, 0.3, -0.2])
    stored = combined(names, weights.tolist(), combine=combine, density=0.4, seed=3)
    found = registry.read_delta(stored).tensors
    parents = [merged_weights(name) for name in names]
    torch.manual_seed(3)
    for name in sorted(name for name in found if not name.startswith("classifier")):
        vectors = [(parent[name] - base_weights[name]).float().flatten() for parent in parents]
        merged = getattr(merge_utils, combine)(vectors, weights, 0.4)
        expected = base_weights[name].float().flatten() + merged
        torch.testing.assert_close(found[name].flatten(), expected, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("names", [["lora", "lora-other"], ["full", "lora"]])
@pytest.mark.parametrize("combine", ["dare_linear", "dare_ties"])
def test_a_seed_makes_dare_repeatable_and_is_recorded(registry, combined, names, combine):
    def made(seed):
        torch.rand(1)  # the caller's own draws change nothing
        stored = combined(names, combine=combine, density=0.5, seed=seed)
        assert stored.info.method["seed"] == seed
        return registry.read_delta(stored).tensors

    one, again, other = made(1), made(1), made(2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_a_density_of_one_prunes_nothing(registry, combined, merged_weights, base_weights):
    combined(["full", "lora"], [0.5, 0.3], combine="dare_linear", density=1.0)
    parents = [merged_weights(name) for name in ("full", "lora")]
    expected = weighted_sum(base_weights, parents, [0.5, 0.3])
    assert distance(merged_weights("out"), expected, base_weights) < 1e-6


def test_linear_on_factors_is_no_weighted_sum_and_the_drift_says_so(combined):
    stored = combined(["lora", "lora-other"], combine="linear")
    assert 0.5 < stored.info.method["drift"]["relative_distance"] < 2
    assert stored.info.method["drift"]["max_abs_difference"] > 1e-3
    assert stored.info.verification.max_abs_difference == 0


@pytest.mark.slow
def test_an_svd_of_low_rank_says_what_it_holds(registry, combined, merged_weights, base_weights):
    names, weights = ["lora", "rank-3"], [0.5, 0.5]
    stored = combined(names, weights, combine="svd", rank=2)
    expected = weighted_sum(base_weights, [merged_weights(name) for name in names], weights)
    apart = distance(merged_weights("out"), expected, base_weights)
    method = stored.info.method
    assert 0.1 < apart < 0.9
    assert method["rank"] == 2
    assert method["norm_held"] == pytest.approx(1 - apart**2, abs=1e-6)
    assert method["drift"]["relative_distance"] == pytest.approx(apart, abs=1e-6)
    assert combined(names, weights, combine="svd").info.method["norm_held"] == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 64])
def test_a_rank_above_a_layers_width_is_cut_to_it(registry, combined, rank):
    stored = combined(["lora", "lora-other"], combine="ties_svd", density=0.5, rank=rank)
    ranks = {t.shape[0] for n, t in registry.read_delta(stored).tensors.items() if "lora_A" in n}
    assert ranks == {min(rank, 16)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "section"),
    [("bf16", {"type": "lora", "r": 2}), ("no", {"type": "qlora", "r": 2})],
    ids=["bf16", "nf4"],
)
def test_other_ways_of_holding_the_base(base_of, tmp_path, combined, precision, section):
    from stored_deltas import store

    registry = Registry(tmp_path)
    for seed, name in enumerate("ab"):
        store(registry, base_of("bert"), name, section, precision=precision, seed=seed)
    info = combined(["a", "b"], where=registry).info
    assert info.method["drift"]["relative_distance"] < 1e-6
    assert info.verification.max_abs_difference < 1e-5
    assert info.verification.bound.startswith("KL" if info.quantisation else "max")


@pytest.mark.slow
def test_a_full_fine_tune_and_a_lora_in_16_bits(base_of, tmp_path, combined):
    from stored_deltas import store

    registry = Registry(tmp_path)
    sections = {"lora": {"type": "lora", "r": 2}, "full": {"type": "full"}}
    for name, section in sections.items():
        store(registry, base_of("bert"), name, section, precision="bf16")
    for names in (["lora", "full"], ["full", "lora"]):
        info = combined(names, where=registry).info
        assert info.method["drift"]["relative_distance"] < 1e-6
        model = load_delta("out", registry=registry).model
        assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_other_architectures(base_of, tmp_path, combined, model_type):
    from stored_deltas import LORA, store

    registry = Registry(tmp_path)
    for seed, (name, section) in enumerate({"a": LORA, "b": LORA | {"r": 3}}.items()):
        store(registry, base_of(model_type), name, section, seed=seed)
    for combine in ("cat", "svd"):
        info = combined(["a", "b"], [0.7, 0.6], combine=combine, where=registry).info
        assert info.method["drift"]["relative_distance"] < 1e-6


@pytest.mark.slow
def test_plain_peft_opens_the_result(registry, combined, base_of):
    import warnings

    from peft import PeftModel
    from sums import plain_model

    stored = combined(["lora", "rank-3"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        model = PeftModel.from_pretrained(plain_model(base_of("bert")), stored.path)
    batch = tiny_runs.make_batch(base_of("bert"), seed=99)
    found = tiny_runs.logits_of(load_delta("out", registry=registry).model, batch)
    assert torch.equal(tiny_runs.logits_of(model, batch), found)


def test_the_info_says_what_it_was_made_of(registry, combined):
    parents = [registry.find(name) for name in ("full", "dora")]
    info = combined(["full", "dora"], [0.6, 0.4], combine="ties", density=0.25).info
    assert [(p.reference, p.digest, p.weight) for p in info.parents] == [
        ("full@v1", parents[0].digest, 0.6),
        ("dora@v1", parents[1].digest, 0.4),
    ]
    assert info.method | {"drift": None} == {
        "type": "merge",
        "combine": "ties",
        "weights": [0.6, 0.4],
        "density": 0.25,
        "rank": None,
        "seed": None,
        "head_from": None,
        "norm_held": None,
        "drift": None,
    }
    assert (info.run.status, info.run.metrics) == ("combined", {})
    assert info.run.record == parents[0].info.run.record
    assert (info.task, info.labels) == (parents[0].info.task, parents[0].info.labels)


# Planted faults: each must be seen before anything is saved.


def refused(combined, registry, *arguments, **options):
    before = {row["name"]: row["version"] for row in registry.ls().rows}
    with pytest.raises(RegistryError) as caught:
        combined(*arguments, save_as="never", **options)
    assert "never" not in {row["name"] for row in registry.ls().rows}
    assert before == {row["name"]: row["version"] for row in registry.ls().rows}
    return str(caught.value)


WRONG = "verification: the result answers differently from what it was made of: max |Δlogit| "


def test_a_scaling_that_is_lost_is_noticed(registry, combined, monkeypatch):
    layers = lora_combination._layers

    def unscaled(fold):
        return {n: lora_combination.Factors(f.a, f.b) for n, f in layers(fold).items()}

    monkeypatch.setattr(lora_combination, "_layers", unscaled)
    assert refused(combined, registry, ["lora", "rslora"]).startswith(WRONG)


def test_a_weight_that_is_lost_is_noticed(registry, combined, monkeypatch):
    from peftkit.merging.task_vectors import Arithmetic

    monkeypatch.setattr(Arithmetic, "__call__", lambda self, vectors: sum(vectors))
    assert refused(combined, registry, ["full", "lora"]).startswith(WRONG)


def test_files_that_read_back_as_another_delta_are_noticed(registry, combined, monkeypatch):
    read = checking.delta_from_files

    def changed(*arguments, **options):
        delta = read(*arguments, **options)
        for tensor in delta.tensors.values():
            tensor += 0.01
        return delta

    monkeypatch.setattr(checking, "delta_from_files", changed)
    for combine in ("cat", "linear"):
        said = refused(combined, registry, ["lora", "lora-other"], combine=combine)
        assert said.startswith(WRONG)


@pytest.mark.slow
def test_a_store_that_gives_back_another_delta_loses_the_version(registry, combined, monkeypatch):
    read = Registry.read_delta

    def changed(self, stored, **options):
        delta = read(self, stored, **options)
        if stored.name == "never":
            next(iter(delta.tensors.values())).view(torch.int32)[0] ^= 1
        return delta

    monkeypatch.setattr(Registry, "read_delta", changed)
    said = refused(combined, registry, ["lora", "lora-other"])
    assert said == "never@v1: reads back as another than was saved; nothing is kept"
