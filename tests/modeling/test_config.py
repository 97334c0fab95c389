"""A base's config: no code of its own runs, and a change of it is noticed."""

import io
import json
import shutil
import sys

import pytest

from peftkit.contracts import LoadOptions
from peftkit.errors import SourceError
from peftkit.modeling.config import described, differences, read_config
from peftkit.modeling.loading import ModelSpec, load_model

CODE = """
from pathlib import Path
from transformers import BertConfig, BertForSequenceClassification
Path("canary").write_text("sang")
class Evil(BertConfig):
    model_type = {model_type!r}
class EvilModel(BertForSequenceClassification):
    config_class = Evil
"""


@pytest.fixture
def edited(base_of, tmp_path):
    """A copy of a base with other keys in its config."""

    def edit(**keys):
        folder = tmp_path / "base"
        shutil.copytree(base_of("bert"), folder, dirs_exist_ok=True)
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
        return folder

    return edit


@pytest.mark.parametrize("model_type", ["evil", "bert"])
def test_code_of_a_base_never_runs_whatever_is_asked(edited, tmp_path, monkeypatch, model_type):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    code = {"AutoConfig": "code.Evil", "AutoModelForSequenceClassification": "code.EvilModel"}
    folder = edited(model_type=model_type, auto_map=code)
    (folder / "code.py").write_text(CODE.format(model_type=model_type))
    spec = ModelSpec("AutoModelForSequenceClassification", {"num_labels": 2})
    if model_type == "bert":  # an architecture of transformers' own is taken from there
        assert type(load_model(folder, spec, LoadOptions())).__name__ != "EvilModel"
    else:
        with pytest.raises(SourceError, match=r"cannot be used without code of its own"):
            load_model(folder, spec, LoadOptions())
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("key", ["trust_remote_code", "gguf_file", "subfolder", "hidden_act"])
def test_a_spec_sets_what_a_task_may_set_and_nothing_else(base_of, key):
    spec = ModelSpec("AutoModelForSequenceClassification", {"num_labels": 2, key: True})
    with pytest.raises(SourceError) as caught:
        load_model(base_of("bert"), spec, LoadOptions())
    assert str(caught.value) == (
        f"{base_of('bert')}: config keys {key} are not set; "
        "only id2label, label2id, num_labels, pad_token_id, problem_type"
    )


@pytest.mark.parametrize("name", ["BertModel", "AutoModel", "AutoModelForNothing", "pipeline"])
def test_only_a_class_for_a_task_is_built(base_of, name):
    with pytest.raises(SourceError, match=f"'{name}' is no AutoModelFor… class"):
        load_model(base_of("bert"), ModelSpec(name), LoadOptions())


def test_a_damaged_config_is_one_line(edited):
    folder = edited()
    (folder / "config.json").write_text("{")
    with pytest.raises(SourceError) as caught:
        read_config(folder)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("hidden_act", "relu", "hidden_act: then 'gelu', now 'relu'"),
        ("num_attention_heads", 4, "num_attention_heads: then 2, now 4"),
        ("layer_norm_eps", 1e-3, "layer_norm_eps: then 1e-12, now 0.001"),
        ("num_hidden_layers", 2, "num_hidden_layers: then 3, now 2"),
        ("hidden_dropout_prob", 0.5, "hidden_dropout_prob: then 0.1, now 0.5"),
    ],
)
def test_a_change_of_what_the_base_computes_is_named(edited, base_of, key, value, line):
    assert differences(edited(**{key: value}), described(base_of("bert"))) == [line]


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"_name_or_path": "elsewhere", "transformers_version": "4.0.0"},
        {"architectures": ["Other"], "dtype": "bfloat16"},
        {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}},
        {"layer_norm_eps": 1e-12},
    ],
)
def test_where_a_config_comes_from_is_no_change(edited, base_of, keys):
    assert differences(edited(**keys), described(base_of("bert"))) == []


def test_what_is_described_is_plain_json(base_of):
    for architecture in ("bert", "llama", "gpt2"):
        folder = base_of(architecture)
        stored = json.loads(json.dumps(described(folder)))
        assert differences(folder, stored) == []
