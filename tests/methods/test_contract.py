"""The contract that every built-in method keeps, over architectures and settings.

Each case is loaded, prepared, trained for three steps and stored; its delta is then put on a fresh
base by peftkit and, if it is an adapter, by PEFT alone.
"""

import re
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import tiny_runs
import torch

from peftkit.contracts import LoadOptions
from peftkit.modeling.parameters import trainable_parameters
from peftkit.plugins import BUILTIN
from peftkit.registry.loading import load_delta
from peftkit.registry.store import Registry

HEADS = {
    "bert": {"classifier.weight", "classifier.bias"},
    "roberta": {
        f"classifier.{layer}.{kind}"
        for layer in ("dense", "out_proj")
        for kind in ("weight", "bias")
    },
    "distilbert": {
        f"{layer}.{kind}"
        for layer in ("pre_classifier", "classifier")
        for kind in ("weight", "bias")
    },
    "gpt2": {"score.weight"},
    "llama": {"score.weight"},
}
LORA_AB = r"\.lora_[AB]\.default\.weight"
QV = ["query", "value"]
LORA = {"type": "lora", "r": 2}
LORA_QV = {**LORA, "target_modules": QV}
QLORA = {"type": "qlora", "r": 2}
LOHA = {"type": "peft", "peft_type": "LOHA", "r": 2, "target_modules": QV}
IA3 = {
    "type": "peft",
    "peft_type": "IA3",
    "target_modules": ["key", "value", "output.dense"],
    "feedforward_modules": ["output.dense"],
}
VERA = {"type": "peft", "peft_type": "VERA", "r": 4, "target_modules": QV}
PREFIX = {"type": "peft", "peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}
PROJECTED = {**PREFIX, "prefix_projection": True, "encoder_hidden_size": 8}
P_TUNING = {
    "type": "peft",
    "peft_type": "P_TUNING",
    "num_virtual_tokens": 3,
    "encoder_hidden_size": 8,
}
DISTILBERT_PROMPT = {"token_dim": 16, "num_layers": 3, "num_attention_heads": 2}


@dataclass(frozen=True)
class Case:
    """A setting, and what must train besides the head: how many tensors, and their names."""

    architecture: str
    section: dict[str, Any]
    count: int
    pattern: str = LORA_AB


def full(architecture, count, decay=1.0):
    section = {"type": "full", "layerwise_lr_decay": decay}
    return Case(architecture, section, count, r".*")


def top(architecture, layers, count, pattern):
    return Case(architecture, {"type": "top_layers", "num_layers": layers}, count, pattern)


CASES = {
    "full": full("bert", 55),
    "full-decay": full("bert", 55, 0.8),
    "full-distilbert-decay": full("distilbert", 52, 0.8),
    "full-gpt2-decay": full("gpt2", 40, 0.8),
    "full-llama": full("llama", 29),
    "top-0": top("bert", 0, 2, r"bert\.pooler\."),
    "top-1": top("bert", 1, 18, r"bert\.(pooler|encoder\.layer\.2)\."),
    "top-all": top("bert", 3, 50, r"bert\.(pooler|encoder\.layer)\."),
    "top-0-roberta": top("roberta", 0, 0, r"$^"),
    "top-1-roberta": top("roberta", 1, 16, r"roberta\.encoder\.layer\.2\."),
    "top-1-distilbert": top("distilbert", 1, 16, r"distilbert\.transformer\.layer\.2\."),
    "top-1-gpt2": top("gpt2", 1, 12, r"transformer\.h\.2\."),
    "top-1-llama": top("llama", 1, 9, r"model\.layers\.2\."),
    "lora": Case("bert", LORA, 38),
    "lora-query-value": Case("bert", LORA_QV, 12, r"\.(query|value)\.lora_[AB]\."),
    "lora-dropout": Case("bert", {**LORA_QV, "lora_dropout": 0.2}, 12),
    "lora-bias": Case("bert", {**LORA_QV, "bias": "lora_only"}, 18, rf"{LORA_AB}|\.bias"),
    "lora-all-biases": Case("bert", {**LORA_QV, "bias": "all"}, 38, rf"{LORA_AB}|\.bias"),
    "lora-b-bias": Case("bert", {**LORA_QV, "lora_bias": True}, 18, r"\.lora_[AB]\."),
    "lora-dora": Case("bert", {**LORA_QV, "use_dora": True}, 18, r"\.lora_([AB]|magnitude)"),
    "lora-rslora": Case("bert", {**LORA, "use_rslora": True}, 38),
    "lora-pissa": Case("bert", {**LORA, "init_lora_weights": "pissa"}, 38),
    "lora-pissa-patterns": Case(
        "bert",
        {
            **LORA_QV,
            "init_lora_weights": "pissa_niter_4",
            "rank_pattern": {"layer.0.attention.self.query": 3},
            "alpha_pattern": {"value": 5},
        },
        12,
    ),
    "lora-pissa-embedding": Case(
        "bert",
        {**LORA, "init_lora_weights": "pissa", "target_modules": ["query", "word_embeddings"]},
        8,
        r"\.lora_(embedding_)?[AB]\.",
    ),
    "lora-olora": Case("bert", {**LORA, "init_lora_weights": "olora"}, 38),
    "lora-plus": Case("bert", {**LORA, "loraplus_lr_ratio": 8.0}, 38),
    "lora-pooler": Case(
        "bert", {**LORA_QV, "modules_to_save": ["pooler"]}, 14, rf"{LORA_AB}|pooler\.dense"
    ),
    "lora-tokens": Case(
        "bert", {**LORA_QV, "trainable_token_indices": [4, 5]}, 13, rf"{LORA_AB}|trainable_tokens"
    ),
    "lora-embedding": Case(
        "bert",
        {**LORA_QV, "modules_to_save": ["word_embeddings"]},
        13,
        rf"{LORA_AB}|word_embeddings",
    ),
    "lora-roberta": Case("roberta", LORA, 36),
    "lora-dense-roberta": Case("roberta", {**LORA, "target_modules": ["dense"]}, 18),
    "lora-exclude-roberta": Case("roberta", {**LORA, "exclude_modules": ["query"]}, 30),
    "lora-distilbert": Case("distilbert", LORA, 36),
    "lora-gpt2": Case("gpt2", LORA, 24),
    "lora-pissa-gpt2": Case(
        "gpt2", {**LORA, "init_lora_weights": "pissa", "fan_in_fan_out": True}, 24
    ),
    "lora-llama": Case("llama", LORA, 42),
    "qlora": Case("bert", QLORA, 38),
    "qlora-dora": Case("bert", {**QLORA, "use_dora": True}, 57, r"\.lora_([AB]|magnitude)"),
    "qlora-roberta": Case("roberta", QLORA, 36),
    "qlora-distilbert": Case("distilbert", QLORA, 36),
    "qlora-llama": Case("llama", QLORA, 42),
    "ia3": Case("bert", IA3, 12, r"\.ia3_l\."),
    "loha": Case("bert", LOHA, 24, r"\.hada_w[12]_[ab]\."),
    "vera": Case("bert", VERA, 12, r"\.vera_lambda_[bd]\."),
    "prefix": Case("bert", PREFIX, 1, r"prompt_encoder\.default\.embedding"),
    "prefix-projected": Case("bert", PROJECTED, 5, r"prompt_encoder\."),
    "prefix-llama": Case("llama", PREFIX, 1, r"prompt_encoder\."),
    "p-tuning": Case("bert", P_TUNING, 7, r"prompt_encoder\."),
    "p-tuning-distilbert": Case(
        "distilbert", {**P_TUNING, **DISTILBERT_PROMPT}, 7, r"prompt_encoder\."
    ),
}
MOVES_BASE = {name for name in CASES if "pissa" in name or "olora" in name}
REPARAMETRISED = {"prefix-projected", "p-tuning", "p-tuning-distilbert"}


@dataclass(frozen=True)
class Trained:
    """What one case left behind."""

    name: str
    case: Case
    folder: Any
    method: Any
    model: Any
    trainable: set[str]
    grouped: list[int]
    before: dict[str, torch.Tensor]
    base: list[tuple[str, torch.nn.Parameter, torch.Tensor]]
    delta: Any
    registry: Registry
    batch: dict[str, torch.Tensor]
    logits: torch.Tensor


def plain_names(names):
    """Names as they are in the base, whatever PEFT wrapped around them."""
    wrapping = re.compile(r"^base_model\.(model\.)?|modules_to_save\.default\.|base_layer\.")
    return {wrapping.sub("", name) for name in names}


@pytest.fixture(scope="module", params=sorted(CASES))
def trained(request, base_of, tmp_path_factory):
    name, case = request.param, CASES[request.param]
    folder, method = base_of(case.architecture), tiny_runs.make_method(case.section)
    loaded = tiny_runs.load_base(folder, method)
    base = [(n, p, p.detach().clone()) for n, p in loaded.named_parameters()]
    model = method.prepare(loaded)
    groups = method.parameter_groups(model, 1e-2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainable = set(trainable_parameters(model))
    tiny_runs.train(model, method, folder)
    batch = tiny_runs.make_batch(folder, seed=99)
    logits = tiny_runs.logits_of(model, batch)
    delta = method.delta(model)
    registry = Registry(tmp_path_factory.mktemp("registry"))
    registry.save("delta", delta, tiny_runs.info_for(folder, method, delta))
    grouped = [id(p) for group in groups for p in group.parameters]
    return Trained(
        name, case, folder, method, model, trainable, grouped, before, base, delta, registry, batch,
        logits,
    )  # fmt: skip


def test_every_built_in_method_has_cases():
    assert {case.section["type"] for case in CASES.values()} == set(BUILTIN["methods"])


def test_exactly_the_documented_parameters_train(trained):
    head = HEADS[trained.case.architecture]
    names = plain_names(trained.trainable)
    assert head <= names
    others = names - head
    assert len(others) == trained.case.count
    assert [name for name in others if not re.search(trained.case.pattern, name)] == []


def test_nothing_is_adapted_inside_the_head(trained):
    # A head trains in full; an adapter in it as well would train it twice.
    tops = {name.partition(".")[0] for name in HEADS[trained.case.architecture]}
    in_head = {n for n in plain_names(trained.trainable) if n.partition(".")[0] in tops}
    assert in_head == HEADS[trained.case.architecture]


def test_groups_hold_every_trainable_parameter_once(trained):
    expected = [id(p) for p in trainable_parameters(trained.model).values()]
    assert len(trained.grouped) == len(expected)
    assert set(trained.grouped) == set(expected)


def test_training_changes_what_trains_and_nothing_else(trained):
    now = dict(trained.model.named_parameters())
    changed = {n for n, old in trained.before.items() if not torch.equal(now[n].detach(), old)}
    assert changed == trained.trainable


def test_an_adapter_leaves_the_base_as_it_was(trained):
    if trained.delta.kind == "weights" or trained.name in MOVES_BASE:
        pytest.skip("changes the base on purpose")
    moved = [n for n, p, old in trained.base if not p.requires_grad and not torch.equal(p, old)]
    assert moved == []
    assert {n for n, p, _ in trained.base if p.requires_grad} <= plain_names(trained.trainable)


def test_delta_holds_everything_that_trained(trained):
    skipped = ("prompt_encoder.",) if trained.name in REPARAMETRISED else ()
    if trained.name in MOVES_BASE:  # stored as another LoRA of the same effect
        skipped = tuple(name for name in trained.trainable if ".lora_" in name)
    stored = list(trained.delta.tensors.values())
    lost = [
        name
        for name, p in trainable_parameters(trained.model).items()
        if not name.startswith(skipped or "-")
        and not any(p.shape == t.shape and torch.equal(p, t) for t in stored)
    ]
    assert lost == []


def test_delta_is_detached_from_the_model(trained):
    memory = {p.data_ptr() for p in trained.model.parameters()}
    tensors = trained.delta.tensors.values()
    assert [t for t in tensors if t.requires_grad or t.data_ptr() in memory] == []


def test_reloading_gives_the_same_logits(trained):
    torch.manual_seed(4321)  # another head than the one that training began with
    loaded = load_delta("delta", registry=trained.registry)
    found = tiny_runs.logits_of(loaded.model, trained.batch)
    if trained.name in MOVES_BASE | REPARAMETRISED:  # the same number by other arithmetic
        torch.testing.assert_close(found, trained.logits, rtol=0, atol=1e-6)
    else:
        assert torch.equal(found, trained.logits)
    assert not loaded.model.training
    assert trainable_parameters(loaded.model) == {}


def test_the_untrained_base_answers_otherwise(trained):
    base = tiny_runs.load_base(trained.folder, trained.method)
    found = tiny_runs.logits_of(base, trained.batch)
    assert (found - trained.logits).abs().max() > 1e-2


def test_peft_alone_opens_an_adapter(trained):
    if trained.delta.kind == "weights" or trained.method.load_options().quantisation:
        pytest.skip("no adapter over a plain base")
    import peft

    class Plain:
        """Loads as transformers does by itself."""

        def load_options(self):
            return LoadOptions()

    base = tiny_runs.load_base(trained.folder, Plain(), seed=77)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        # PEFT's own false alarm about `lora_bias`.
        warnings.filterwarnings("ignore", r".*invalid shape: \S*lora_B\.bias")
        model = peft.PeftModel.from_pretrained(base, trained.registry.find("delta").path)
    found = tiny_runs.logits_of(model, trained.batch)
    torch.testing.assert_close(found, trained.logits, rtol=0, atol=1e-6)
