"""A merged model is the trained model, opened by transformers alone, or there is none."""

import json
import shutil

import pytest
import stored_deltas
import tiny_runs
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification

from peftkit.errors import RegistryError
from peftkit.merging import folding, into_base, writing
from peftkit.merging.into_base import RECORD_FILE, MergeOptions, merge_into_base
from peftkit.modeling.identity import base_digest
from peftkit.registry import Registry
from peftkit.registry.loading import load_delta

KINDS = {name: stored_deltas.SECTIONS[name] for name in stored_deltas.SECTIONS if name != "prefix"}
EVERYWHERE = ("full", "top_layers", "lora", "rslora", "dora", "lora-tokens")
QUICK = {"bert full", "bert top_layers", "bert lora", "bert dora", "bert saved", "bert ia3"}
QUICK |= {"gpt2 lora", "llama lora", "llama full", "bert True"}


def cases(*rows):
    """Parameters of which all but a few wait for the full check."""
    return [
        row if " ".join(map(str, row)) in QUICK else pytest.param(*row, marks=pytest.mark.slow)
        for row in rows
    ]


@pytest.fixture
def registry(tmp_path) -> Registry:
    return Registry(tmp_path / "store")


def merged_folder(registry, folder, section, *, options=None, **keys):
    """Store a delta as `d`, fold it into its base, and give the merged folder."""
    stored_deltas.store(registry, folder, "d", section, **keys)
    target = registry.root.parent / "merged"
    return merge_into_base(registry, "d", target, options or MergeOptions())


def logits(model, folder):
    return tiny_runs.logits_of(model, tiny_runs.make_batch(folder))


def distance(a, b):
    return float((a - b).abs().max())


def refusal(action, *arguments, **keys):
    with pytest.raises(RegistryError) as caught:
        action(*arguments, **keys)
    return caught.value.problems


@pytest.mark.parametrize(
    ("architecture", "kind"),
    cases(
        *(("bert", kind) for kind in KINDS),
        *((model, kind) for model in ("gpt2", "llama", "distilbert") for kind in EVERYWHERE),
    ),
)
def test_transformers_alone_opens_a_merged_model_that_answers_as_trained(
    base_of, registry, architecture, kind
):
    folder = base_of(architecture)
    before = base_digest(folder)
    merged = merged_folder(registry, folder, KINDS[kind])
    model = AutoModelForSequenceClassification.from_pretrained(merged.folder)
    expected = logits(load_delta("d", registry=registry).model, folder)
    assert distance(logits(model, folder), expected) <= 1e-5
    assert logits(model, folder).argmax(-1).tolist() == expected.argmax(-1).tolist()
    assert merged.verification.max_abs_difference <= 1e-5
    assert model.config.id2label == {0: "label 0", 1: "label 1"}
    assert base_digest(folder) == before


def test_a_base_in_many_shards_is_merged_into_as_many(tmp_path, base_of, registry):
    folder = shutil.copytree(base_of("bert"), tmp_path / "sharded")
    (folder / "model.safetensors").unlink()
    AutoModel.from_pretrained(base_of("bert")).save_pretrained(folder, max_shard_size="10KB")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2
    merged = merged_folder(registry, folder, KINDS["lora"])
    assert sorted(path.name for path in merged.folder.glob("*.safetensors")) == shards
    index = json.loads((merged.folder / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == shards
    model = AutoModelForSequenceClassification.from_pretrained(merged.folder)
    assert set(index["weight_map"]) == set(model.state_dict())


def test_a_run_in_bf16_is_folded_into_the_rounded_base_that_it_trained_over(base_of, registry):
    merged = merged_folder(registry, base_of("bert"), KINDS["lora"], precision="bf16")
    tensors = load_file(merged.folder / "model.safetensors")
    embedding = tensors["bert.embeddings.word_embeddings.weight"]
    assert embedding.dtype == torch.float32
    assert torch.equal(embedding, embedding.bfloat16().float())
    assert merged.verification.max_abs_difference <= 1e-5


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_written_in_16_bits_it_is_rounded_once(base_of, registry, kind):
    options = MergeOptions(dtype="bfloat16")
    merged = merged_folder(registry, base_of("llama"), KINDS[kind], options=options)
    tensors = load_file(merged.folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert 0 < merged.verification.kl_divergence <= 1e-4
    assert merged.verification.bound == "KL ≤ 0.0001"


def test_a_base_in_16_bits_stays_in_16_bits(tmp_path, base_of, registry):
    folder = shutil.copytree(base_of("llama"), tmp_path / "half")
    tensors = load_file(folder / "model.safetensors")
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(half, folder / "model.safetensors")
    merged = merged_folder(registry, folder, KINDS["lora"])
    written = load_file(merged.folder / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    model = AutoModelForSequenceClassification.from_pretrained(merged.folder)
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("architecture", "double_quant"),
    cases(*((model, double) for model in ("bert", "gpt2", "llama") for double in (True, False))),
)
def test_qlora_folds_into_the_base_as_4_bits_left_it(base_of, registry, architecture, double_quant):
    section = stored_deltas.QLORA | {"double_quant": double_quant}
    merged = merged_folder(registry, base_of(architecture), section)
    assert merged.verification.kl_divergence <= 1e-5
    assert merged.verification.top1_agreement == 1.0
    drift = {target: found.kl_divergence for target, found in merged.drift.items()}
    assert drift["dequantised"] <= 1e-5 < min(drift["original"], drift["quantised"])
    assert json.loads((merged.folder / RECORD_FILE).read_text())["drift"].keys() == drift.keys()


@pytest.mark.parametrize("target", ["original", "quantised"])
@pytest.mark.parametrize(
    "architecture",
    ["bert", *(pytest.param(model, marks=pytest.mark.slow) for model in ("gpt2", "llama"))],
)
def test_other_targets_are_written_when_asked_for(base_of, registry, target, architecture):
    options = MergeOptions(target=target)
    merged = merged_folder(registry, base_of(architecture), stored_deltas.QLORA, options=options)
    assert merged.verification.bound == "any finite difference"
    assert merged.verification.kl_divergence == pytest.approx(
        merged.drift[target].kl_divergence, rel=1e-3, abs=1e-9
    )
    model = AutoModelForSequenceClassification.from_pretrained(merged.folder)
    assert getattr(model, "is_loaded_in_4bit", False) == (target == "quantised")


def test_a_limit_on_the_drift_is_kept(base_of, registry):
    options = MergeOptions(target="original", max_kl=1e-9)
    problems = refusal(
        merged_folder, registry, base_of("bert"), stored_deltas.QLORA, options=options
    )
    assert len(problems) == 1
    assert problems[0].endswith("; allowed: KL ≤ 1e-09; nothing is kept")
    assert not (registry.root.parent / "merged").exists()


def test_the_source_is_only_read(base_of, registry, tmp_path):
    folder = shutil.copytree(base_of("bert"), tmp_path / "read-only")
    for path in folder.iterdir():
        path.chmod(0o444)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    merged_folder(registry, folder, KINDS["lora"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_output_that_exists_is_refused(base_of, registry, tmp_path):
    merged = merged_folder(registry, base_of("bert"), KINDS["lora"])
    assert refusal(merge_into_base, registry, "d", merged.folder, MergeOptions()) == [
        f"{merged.folder}: exists; take another folder or remove it"
    ]


def test_a_delta_is_not_merged_twice(base_of, registry, tmp_path):
    """The merged model is another base than the delta's own."""
    merged = merged_folder(registry, base_of("bert"), KINDS["lora"])
    stored = registry.find("d")
    recipe = {"base": {"name": str(merged.folder)}}
    info = stored.info.model_copy(update={"recipe": recipe})
    delta = registry.read_delta(stored)
    registry.save("again", delta, info)
    problems = refusal(merge_into_base, registry, "again", tmp_path / "twice", MergeOptions())
    assert problems[0] == (
        f"again@v1: trained on {info.base_name} with weights {info.base_digest}, "
        f"but {merged.folder} has {base_digest(merged.folder)}"
    )
    assert not (tmp_path / "twice").exists()


def test_prompts_cannot_be_folded(base_of, registry):
    section = stored_deltas.SECTIONS["prefix"]
    assert refusal(merged_folder, registry, base_of("bert"), section) == [
        "PREFIX_TUNING: works beside the base's weights and cannot be folded into them; "
        "serve it as an adapter"
    ]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            MergeOptions(target="orginal"),
            "--target: unknown 'orginal'; did you mean 'original'? "
            "Choices: dequantised, original, quantised",
        ),
        (
            MergeOptions(target="original"),
            "--target: d@v1 was not trained over 4 bits and has one target only",
        ),
        (
            MergeOptions(dtype="float61"),
            "--dtype: unknown 'float61'; did you mean 'float16'? "
            "Choices: bfloat16, float16, float32",
        ),
        (MergeOptions(max_kl=0.0), "--max-kl: expected a number above 0, found 0.0"),
    ],
)
def test_options_that_do_not_fit_are_refused(base_of, registry, options, problem):
    assert refusal(merged_folder, registry, base_of("bert"), KINDS["lora"], options=options) == [
        problem
    ]


def test_values_that_float16_cannot_hold_are_refused(base_of, registry, monkeypatch):
    own = folding.Fold.blocks
    monkeypatch.setattr(
        folding.Fold, "blocks", lambda self, name: (block * 1e9 for block in own(self, name))
    )
    options = MergeOptions(dtype="float16")
    problems = refusal(merged_folder, registry, base_of("bert"), KINDS["lora"], options=options)
    assert problems[0].endswith("holds a value that float16 cannot; take --dtype bfloat16")


def test_nan_in_a_merged_tensor_is_refused(base_of, registry, monkeypatch):
    own = folding.HeldBase.as_held
    monkeypatch.setattr(
        folding.HeldBase, "as_held", lambda self, name: own(self, name) * float("nan")
    )
    problems = refusal(merged_folder, registry, base_of("bert"), KINDS["lora"])
    assert problems[0].endswith("the merged tensor holds NaN or Inf; nothing is written")
    assert not (registry.root.parent / "merged").exists()


def test_an_adapter_for_other_modules_is_refused_before_anything_is_written(base_of, registry):
    stored = stored_deltas.store(registry, base_of("bert"), "d", KINDS["lora"])
    delta = registry.read_delta(stored)
    config = {**delta.adapter_config, "target_modules": ["no_such_layer"]}
    registry.save("d", type(delta)("adapter", delta.tensors, config), stored.info)
    target = registry.root.parent / "merged"
    problems = refusal(merge_into_base, registry, "d", target, MergeOptions())
    assert problems[0].startswith(
        "delta: PEFT refuses it: No modules were targeted for adaptation."
    )
    assert not target.exists()


def planted(monkeypatch, fault):
    """Put a fault into the arithmetic that a merge must find out."""
    if fault == "nothing is merged":
        monkeypatch.setattr(folding.Fold, "blocks", lambda self, name: iter([self.base(name)]))
    elif fault == "merged twice":
        own_factors = folding.Fold._plain_factors

        def twice(self, name):
            factors = own_factors(self, name)
            return factors and (*factors[:2], 2 * factors[2])

        monkeypatch.setattr(folding.Fold, "_plain_factors", twice)
    elif fault == "the head is lost":
        monkeypatch.setattr(folding, "_saved_modules", lambda *_: {})
    elif fault == "one shard keeps the base's tensors":
        own = folding.Fold.blocks
        monkeypatch.setattr(
            folding.Fold,
            "blocks",
            lambda self, name: iter([self.base(name)]) if ".0." in name else own(self, name),
        )


@pytest.mark.parametrize(
    "fault",
    ["nothing is merged", "merged twice", "the head is lost", "one shard keeps the base's tensors"],
)
def test_a_merge_that_went_wrong_leaves_nothing(base_of, registry, monkeypatch, fault):
    planted(monkeypatch, fault)
    with pytest.raises(Exception, match=r"verification: |changes no tensor|no such tensor|missing"):
        merged_folder(registry, base_of("bert"), KINDS["lora"])
    assert not (registry.root.parent / "merged").exists()


def test_folding_a_qlora_into_the_unrounded_base_is_found_out(base_of, registry, monkeypatch):
    monkeypatch.setattr(folding.HeldBase, "as_held", lambda self, name: self.stored(name))
    problems = refusal(merged_folder, registry, base_of("bert"), stored_deltas.QLORA)
    assert problems[0].startswith("verification: the result answers differently")
    assert problems[0].endswith("; allowed: KL ≤ 1e-05; nothing is kept")


def test_an_adapter_that_changes_nothing_is_refused(base_of, registry):
    stored = stored_deltas.store(registry, base_of("bert"), "d", KINDS["lora"])
    delta = registry.read_delta(stored)
    still = {n: t * 0 if "lora_B" in n else t for n, t in delta.tensors.items()}
    registry.save("d", type(delta)("adapter", still, delta.adapter_config), stored.info)
    target = registry.root.parent / "merged"
    assert refusal(merge_into_base, registry, "d", target, MergeOptions()) == [
        "delta: changes no tensor of the base; nothing is written"
    ]


def test_a_full_disk_leaves_nothing(base_of, registry, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "write_shard", full)
    problems = refusal(merged_folder, registry, base_of("bert"), KINDS["lora"])
    target = registry.root.parent / "merged"
    assert problems == [
        f"{target}: nothing was written (No space left on device); "
        "free some space or point PEFTKIT_REGISTRY at another disk"
    ]
    assert [path.name for path in target.parent.iterdir()] == ["store"]


def test_the_record_says_what_was_merged(base_of, registry):
    merged = merged_folder(registry, base_of("bert"), KINDS["lora"])
    record = json.loads((merged.folder / RECORD_FILE).read_text())
    assert record["delta"] == "d@v1"
    assert record["delta_digest"] == registry.find("d").digest
    assert record["base_digest"] == base_digest(base_of("bert"))
    assert record["verification"] == merged.verification.model_dump()
    assert into_base.described(merged) == {k: v for k, v in record.items() if k != "schema_version"}
