"""A LoRA out of changed weights: the best of its rank, and equal to them where the rank is full."""

import warnings

import pytest
import tiny_runs
import torch
from stored_deltas import LORA, store
from sums import plain_model

from peftkit.errors import RegistryError, UsageError
from peftkit.merging import extraction
from peftkit.merging.extraction import extract, low_rank
from peftkit.registry.loading import load_delta
from peftkit.registry.store import Registry


def logits(registry, name, folder):
    model = load_delta(name, registry=registry).model
    return tiny_runs.logits_of(model, tiny_runs.make_batch(folder, seed=99))


@pytest.fixture(scope="module")
def linear_only(registry):
    """A weights delta that changes linear layers and the head alone."""
    from peftkit.merging.combining import combine
    from peftkit.merging.plan import plan_from

    plan = plan_from(["lora", "dora"], [], {"save_as": "linear-only"})
    assert combine(registry, plan).stored.info.kind == "weights"
    return "linear-only"


def test_at_full_rank_it_equals_linear_weights(registry, base_of, linear_only):
    found = extract(registry, linear_only, rank=64, save_as="lora-of-it")
    method = found.stored.info.method
    assert method["norm_held"] == pytest.approx(1, abs=1e-12)
    assert (method["left_out"], method["rank"]) == (0, 64)
    assert method["drift"]["relative_distance"] < 1e-6
    assert found.stored.info.verification.bound == "max |Δlogit| ≤ 1e-05, top-1 equal"
    expected = logits(registry, linear_only, base_of("bert"))
    found = logits(registry, "lora-of-it", base_of("bert"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_at_low_rank_it_is_the_best_and_says_what_it_holds(registry, base_of):
    stored = extract(registry, "full", rank=3, save_as="rank-three").stored
    tensors, base = registry.read_delta(stored).tensors, plain_model(base_of("bert")).state_dict()
    whole = registry.read_delta(registry.find("full")).tensors
    layers = {
        n for n, m in plain_model(base_of("bert")).named_modules() if hasattr(m, "in_features")
    }
    layers -= {"classifier"}
    held = in_layers = everywhere = 0.0
    for name, tensor in whole.items():
        if name.startswith("classifier"):
            continue
        change = (tensor - base[name]).double()
        everywhere += float(change.square().sum())
        layer = name.removesuffix(".weight")
        if layer not in layers or layer == name:
            continue
        singular = torch.linalg.svdvals(change)
        held += float(singular[:3].square().sum())
        in_layers += float(singular.square().sum())
        a, b = (tensors[f"base_model.model.{layer}.lora_{x}.weight"] for x in "AB")
        assert (a.shape[0], b.shape[1]) == (3, 3)
        lost = (change - b.double() @ a.double()).square().sum()
        assert float(lost) == pytest.approx(float(singular[3:].square().sum()), rel=1e-5)
    method = stored.info.method
    assert method["norm_held_in_layers"] == pytest.approx(held / in_layers, rel=1e-6)
    assert method["norm_held"] == pytest.approx(held / everywhere, rel=1e-6)
    assert method["layers"] == len(layers) == 19
    assert method["left_out"] == len(whole) - 2 - 19
    assert method["drift"]["relative_distance"] == pytest.approx(
        (1 - method["norm_held"]) ** 0.5, rel=1e-5
    )


def test_the_head_is_kept_whole_and_the_rest_is_said(registry):
    stored = extract(registry, "full", rank=2, save_as="head-kept").stored
    tensors, whole = (registry.read_delta(registry.find(n)).tensors for n in ("head-kept", "full"))
    for name in ("classifier.weight", "classifier.bias"):
        assert torch.equal(tensors[f"base_model.model.{name}"], whole[name])
    info, parent = stored.info, registry.find("full")
    assert [(p.reference, p.digest) for p in info.parents] == [("full@v1", parent.digest)]
    assert (info.kind, info.run.status, info.run.metrics) == ("adapter", "combined", {})
    assert (info.task, info.labels) == (parent.info.task, parent.info.labels)


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_plain_peft_opens_it(base_of, tmp_path, model_type):
    from peft import PeftModel

    registry = Registry(tmp_path)
    store(registry, base_of(model_type), "full", {"type": "full"})
    stored = extract(registry, "full", rank=4, save_as="small").stored
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        model = PeftModel.from_pretrained(plain_model(base_of(model_type)), stored.path)
    found = tiny_runs.logits_of(model, tiny_runs.make_batch(base_of(model_type), seed=99))
    assert torch.equal(found, logits(registry, "small", base_of(model_type)))


@pytest.mark.slow
def test_layers_that_are_stored_transposed(base_of, tmp_path):
    from peftkit.merging.combining import combine
    from peftkit.merging.plan import plan_from

    registry, folder = Registry(tmp_path), base_of("gpt2")
    store(registry, folder, "lora", LORA)
    store(registry, folder, "other", LORA | {"use_dora": True}, seed=1)
    combine(registry, plan_from(["lora", "other"], [], {"save_as": "weights"}))
    info = extract(registry, "weights", rank=64, save_as="again").stored.info
    assert info.method["drift"]["relative_distance"] < 1e-6
    expected, found = logits(registry, "weights", folder), logits(registry, "again", folder)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("section", [{"type": "full"}, {"type": "top_layers", "num_layers": 1}])
def test_a_change_in_16_bits_is_measured_from_the_base_that_was_held(base_of, tmp_path, section):
    registry = Registry(tmp_path)
    store(registry, base_of("bert"), "delta", section, precision="bf16")
    info = extract(registry, "delta", rank=16, save_as="small").stored.info
    assert info.method["norm_held_in_layers"] == pytest.approx(1, abs=1e-9)
    assert (info.model["frozen"], info.model["keeps_float32"]) == (True, True)
    dtypes = {p.dtype for p in load_delta("small", registry=registry).model.parameters()}
    assert dtypes == {torch.float32}


def test_a_wide_layer_is_approximated_within_what_it_says(monkeypatch):
    torch.manual_seed(0)
    decay = torch.logspace(0, -3, 96)
    change = (
        torch.linalg.qr(torch.randn(128, 96))[0] * decay @ torch.linalg.qr(torch.randn(96, 96))[0]
    )
    exact, held = low_rank(change, 8)
    monkeypatch.setattr(extraction, "FULL_SVD", 16)
    state = torch.get_rng_state()
    found, approximate = low_rank(change, 8)
    assert torch.equal(torch.get_rng_state(), state)
    assert approximate.share == pytest.approx(held.share, abs=1e-6)
    torch.testing.assert_close(found.b @ found.a, exact.b @ exact.a, rtol=0, atol=1e-4)


def test_what_is_refused(registry):
    with pytest.raises(UsageError, match=r"^extract: --rank 0: must be at least 1$"):
        extract(registry, "full", rank=0, save_as="x")
    with pytest.raises(RegistryError) as caught:
        extract(registry, "lora", rank=2, save_as="x")
    assert str(caught.value) == (
        "lora@v1: an adapter already; a LoRA is extracted from a delta of kind weights, such as a "
        "full fine-tune"
    )


def test_a_delta_that_changes_the_head_alone(base_of, tmp_path):
    from peftkit.contracts import Delta

    registry = Registry(tmp_path)
    stored = store(registry, base_of("bert"), "full", {"type": "full"})
    tensors = registry.read_delta(stored).tensors
    head = {name: t for name, t in tensors.items() if name.startswith("classifier")}
    registry.save("head", Delta("weights", head), stored.info, base=base_of("bert"))
    with pytest.raises(RegistryError) as caught:
        extract(registry, "head", rank=2, save_as="x")
    assert str(caught.value) == (
        "head@v1: changes no linear layer below its head; nothing to extract"
    )


def test_factors_of_another_layer_are_noticed(registry, linear_only, monkeypatch):
    def transposed(change, rank):
        factors, norm = low_rank(change, rank)
        return extraction.Factors(factors.a, -factors.b), norm

    monkeypatch.setattr(extraction, "low_rank", transposed)
    with pytest.raises(RegistryError, match=r"^verification: the result answers differently"):
        extract(registry, linear_only, rank=64, save_as="never")
    assert "never" not in {row["name"] for row in registry.ls().rows}
