"""A base is loaded as asked, and only its head may be new."""

import json
import shutil

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from peftkit.contracts import LoadOptions, Quantisation
from peftkit.errors import SourceError
from peftkit.modeling import loading
from peftkit.modeling.loading import ModelSpec, load_model
from peftkit.modeling.parameters import head_modules, is_new

CLASSIFY = "AutoModelForSequenceClassification"
MODEL = "BertForSequenceClassification"
QUERY = "encoder.layer.1.attention.self.query"


def load(folder, *, labels=2, options=None, **spec):
    spec = ModelSpec(**{"auto_class": CLASSIFY, "config": {"num_labels": labels}} | spec)
    return load_model(folder, spec, options or LoadOptions())


@pytest.fixture
def changed_base(base_of, tmp_path):
    """A base whose tensors a function has changed."""

    def make(change):
        folder = tmp_path / "base"
        shutil.copytree(base_of("bert"), folder)
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})
        return folder

    return make


def problems_of(folder):
    with pytest.raises(SourceError) as caught:
        load(folder)
    return caught.value.problems


def test_a_missing_tensor_is_refused(changed_base):
    folder = changed_base(lambda t: {k: v for k, v in t.items() if k != f"{QUERY}.weight"})
    assert problems_of(folder) == [
        f"{folder}: 'bert.{QUERY}.weight' of {MODEL} is missing from the base's files"
    ]


def test_a_misshapen_tensor_is_refused(changed_base):
    folder = changed_base(lambda t: t | {f"{QUERY}.bias": torch.zeros(17)})
    assert problems_of(folder) == [
        f"{folder}: 'bert.{QUERY}.bias' of {MODEL} has another shape than the base's files"
    ]


def test_every_problem_is_named_up_to_ten(changed_base):
    folder = changed_base(lambda t: {k: v for k, v in t.items() if "layer.0." not in k})
    problems = problems_of(folder)
    assert len(problems) == 11
    assert all(line.endswith("is missing from the base's files") for line in problems[:10])
    assert problems[10] == f"{folder}: and 6 more tensors"


def test_a_base_for_another_depth_is_refused(changed_base):
    folder = changed_base(dict)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 4}))
    assert len(problems_of(folder)) == 11


def test_a_base_without_the_architecture_is_refused(base_of):
    with pytest.raises(SourceError) as caught:
        load(base_of("distilbert"), auto_class="AutoModelForCausalLM", config={})
    assert str(caught.value) == (
        f"{base_of('distilbert')}: a base of type 'distilbert' has no AutoModelForCausalLM; "
        "take a base with that architecture or another task"
    )


def test_a_missing_pooler_is_new_and_trained(changed_base):
    model = load(changed_base(lambda t: {k: v for k, v in t.items() if "pooler" not in k}))
    assert head_modules(model) == ["classifier", "bert.pooler.dense"]


@pytest.fixture
def base_with_head(base_of, tmp_path):
    """A base that was fine-tuned before: it has a head for three labels."""
    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_pretrained(base_of("bert"), num_labels=3)
    model.save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned"


def test_a_head_of_the_base_is_kept_if_it_fits(base_with_head):
    model = load(base_with_head, labels=3)
    stored = load_file(base_with_head / "model.safetensors")
    assert torch.equal(model.classifier.weight, stored["classifier.weight"])
    assert not is_new(model, "classifier.weight")
    assert head_modules(model) == ["classifier"]


@pytest.mark.parametrize("labels", [1, 2, 4])
def test_a_head_with_another_number_of_labels_is_drawn_anew(base_with_head, labels):
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model = load(base_with_head, labels=labels)
        assert is_new(model, "classifier.weight")
        drawn.append(model.classifier.weight.detach())
    assert drawn[0].shape == (labels, 16)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert drawn[0].std() > 0


def test_a_new_head_is_drawn_from_the_seed(base_of):
    drawn = [
        tiny_runs.load_base(base_of("bert"), FULL, seed=s).classifier.weight for s in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


FULL = tiny_runs.make_method({"type": "full"})


@pytest.mark.parametrize(
    ("options", "precision", "expected"),
    [
        (LoadOptions(), "no", torch.float32),
        (LoadOptions(), "bf16", torch.float32),
        (LoadOptions(frozen=True), "no", torch.float32),
        (LoadOptions(frozen=True), "bf16", torch.bfloat16),
        (LoadOptions(frozen=True), "fp16", torch.float16),
    ],
)
def test_the_base_is_held_as_the_method_asks(base_of, options, precision, expected):
    model = load(base_of("bert"), options=options, mixed_precision=precision)
    assert {p.dtype for p in model.parameters()} == {expected}


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_what_is_not_quantised_is_held_as_the_run_asks(base_of, precision):
    options = LoadOptions(Quantisation(), frozen=True)
    model = load(base_of("bert"), options=options, mixed_precision=precision)
    held = {"no": torch.float32, "bf16": torch.bfloat16}[precision]
    assert {p.dtype for p in model.parameters()} == {held, torch.uint8}


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ("bert", {"hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"}),
        ("distilbert", {"dropout", "attention_dropout", "seq_classif_dropout"}),
        ("gpt2", {"resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"}),
        ("llama", {"attention_dropout"}),
    ],
)
def test_dropout_is_set_everywhere(base_of, architecture, keys):
    model = load(base_of(architecture), dropout=0.3)
    assert {key: getattr(model.config, key) for key in keys} == dict.fromkeys(keys, 0.3)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} <= {0.3}


@pytest.mark.parametrize("model_type", ["albert", "xlnet", "gpt_neox", "rembert", "modernbert"])
def test_no_spelling_of_dropout_is_missed(model_type):
    config = AutoConfig.for_model(model_type)
    loading.set_dropout(config, 0.3)
    spelled = {k: v for k, v in config.to_dict().items() if "dropout" in k and k != "dropatt"}
    assert spelled
    assert set(spelled.values()) == {0.3}


def test_without_a_dropout_the_base_keeps_its_own(base_of):
    model = load(base_of("bert"))
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}


def test_loading_is_silent_and_leaves_the_verbosity(base_of, capfd):
    from transformers.utils import logging

    before = logging.get_verbosity()
    load(base_of("bert"))
    assert capfd.readouterr() == ("", "")
    assert logging.get_verbosity() == before
