"""Nothing that is loaded runs: each attack would leave a file behind, and none does."""

import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import tiny_runs
import torch
from small_store import info
from stored_deltas import LORA

from peftkit.cli import main
from peftkit.contracts import Delta
from peftkit.errors import PeftkitError, RegistryError
from peftkit.modeling.identity import base_digest, tokenizer_digest
from peftkit.recipe import load_recipe
from peftkit.registry import Registry
from peftkit.registry.archive import export_archive, import_archive
from peftkit.registry.loading import load_delta
from peftkit.registry.shared import SharedBase
from peftkit.registry.tensors import TENSOR_FILES, check_files


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """The file that an attack leaves; the module `peftkit_canary` leaves it when it is imported."""
    path = tmp_path / "canary"
    (tmp_path / "peftkit_canary.py").write_text(f"open({str(path)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield path
    sys.modules.pop("peftkit_canary", None)
    assert not path.exists()


class Runs:
    """A pickle that runs a command when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def pickled(path: Path, form: str, place: Path) -> bytes:
    if form == "pickle":
        return pickle.dumps(Runs(path))
    torch.save({"w": Runs(path)}, place)
    return place.read_bytes()


@pytest.fixture
def stored(base_of, tmp_path):
    """(base folder, registry) of a LoRA whose base may be changed."""
    folder, registry = tmp_path / "base", Registry(tmp_path / "registry")
    shutil.copytree(base_of("bert"), folder)
    method = tiny_runs.make_method(LORA)
    delta = method.delta(tiny_runs.prepare(folder, method))
    registry.save("delta", delta, tiny_runs.info_for(folder, method, delta))
    return folder, registry


def saved_again(stored, **changes):
    """The same delta with other settings, as from a stranger."""
    registry = stored[1]
    found = registry.find("delta@v1")
    delta = registry.read_delta(found)
    own = {} if "PROMPT" in str(changes.get("peft_type")) else delta.adapter_config
    settings = {**own, **changes}
    registry.save("delta", Delta("adapter", delta.tensors, settings), found.info)


def told_otherwise(stored, **changes):
    """The same delta with another info."""
    registry = stored[1]
    found = registry.find("delta@v1")
    delta = registry.read_delta(found)
    registry.save("delta", delta, found.info.model_copy(update=changes))


def loads(stored) -> list[str]:
    """Load in both ways; the first line of each refusal."""
    folder, registry = stored
    lines = []
    for load in (
        lambda: load_delta("delta", registry=registry),
        lambda: SharedBase(folder, registry).attach("delta"),
    ):
        try:
            load()
        except PeftkitError as error:
            lines.append(error.problems[0])
    return lines


def test_the_canary_sings(tmp_path, monkeypatch):
    """The planted fault: these attacks work on whoever runs what it loads."""
    path = tmp_path / "canary"
    for form in ("pickle", "torch"):
        data = pickled(path, form, tmp_path / "evil.pt")
        (tmp_path / "evil").write_bytes(data)
        if form == "pickle":
            pickle.loads(data)
        else:
            torch.load(tmp_path / "evil", weights_only=False)
        assert path.exists()
        path.unlink()


@pytest.mark.parametrize("form", ["pickle", "torch"])
@pytest.mark.parametrize("kind", ["adapter", "weights"])
def test_a_pickle_called_safetensors_is_refused(kind, form, canary, tmp_path):
    data = pickled(canary, form, tmp_path / "evil.pt")
    with pytest.raises(RegistryError):
        check_files(kind, {TENSOR_FILES[kind]: data, "adapter_config.json": b"{}"})


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_stored_pickle_is_refused(form, canary, stored, tmp_path):
    registry = stored[1]
    data = pickled(canary, form, tmp_path / "evil.pt")
    # Stored as it is, its digest right: what a stranger's store may hold.
    found = registry.find("delta")
    contents = registry.contents(found)
    files = {**contents.files, TENSOR_FILES["adapter"]: data}
    with pytest.raises(RegistryError):
        registry.receive("other", files, info=contents.info, manifest=contents.manifest)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "model.safetensors"])
def test_a_pickle_beside_the_base_is_not_read(name, canary, stored, tmp_path):
    folder, _ = stored
    only = name == "pytorch_model.bin"
    if only:
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickled(canary, "torch", tmp_path / "evil.pt"))
    assert len(loads(stored)) == (0 if name == "adapter_model.bin" else 2)


HELD = {"mixed_precision": "no", "frozen": True}
AUTO_CLASS = tiny_runs.AUTO_CLASS
CODE = "open({!r}, 'w').close()\nclass Evil: pass\n"


@pytest.mark.parametrize("model_type", ["bert", "evil"])
def test_code_that_a_base_asks_for_does_not_run(model_type, canary, stored):
    folder, _ = stored
    (folder / "evil.py").write_text(CODE.format(str(canary)))
    config = json.loads((folder / "config.json").read_text())
    names = ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification")
    config |= {"auto_map": dict.fromkeys(names, "evil.Evil"), "model_type": model_type}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    tokenizer["chat_template"] = template(canary)
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "chat_template.jinja").write_text(template(canary))
    if model_type == "bert":  # as if it had been trained on this very base
        told_otherwise(stored, tokenizer_digest=tokenizer_digest(folder), base_config=None)
    assert base_digest(folder).startswith("sha256:")
    lines = loads(stored)
    assert model_type == "bert" or len(lines) == 2


def template(path: Path) -> str:
    return f"{{{{ cycler.__init__.__globals__.os.system('touch {path}') }}}}"


STRANGE = [
    {"auto_mapping": {"base_model_class": "Evil", "parent_library": "peftkit_canary"}},
    {"megatron_config": {"a": 1}, "megatron_core": "peftkit_canary"},
    {"peft_type": "../../peftkit_canary"},
    {"peft_type": "peftkit_canary"},
    {"peft_type": ["LORA"]},
    {"peft_type": None},
    {"task_type": "peftkit_canary"},
    {"base_model_name_or_path": "../../../peftkit_canary"},
    {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    {"corda_config": {"cache_file": "evil.pt"}, "init_lora_weights": "corda"},
    {"lora_ga_config": {"direction": "x"}, "init_lora_weights": "lora_ga"},
    {"target_modules": "(a+)+$"},
    {"runtime_config": {"__class__": "peftkit_canary"}},
    {"layer_replication": [[0, 1 << 40]]},
    {"__init__": "peftkit_canary", "__class__": "peftkit_canary"},
    {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "TEXT", "num_virtual_tokens": 2,
     "prompt_tuning_init_text": "x", "tokenizer_name_or_path": "peftkit_canary",
     "tokenizer_kwargs": {"trust_remote_code": True}},
    {"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 2, "num_tasks": 1,
     "prompt_tuning_init": "ONLY_SOURCE_SHARED",
     "prompt_tuning_init_state_dict_path": "evil.pt"},
]  # fmt: skip


@pytest.mark.parametrize("settings", STRANGE, ids=lambda s: "-".join(map(str, s))[:40])
def test_strange_settings_of_an_adapter_run_nothing(
    settings, canary, stored, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    pickled(canary, "torch", tmp_path / "evil.pt")
    try:
        saved_again(stored, **settings)
    except RegistryError:
        return
    loads(stored)


def test_settings_that_peft_would_leave_out_are_refused(canary, stored):
    saved_again(stored, novel=1, dropped=None)
    line = "PEFT refuses it: this version does not know the settings novel"
    assert loads(stored) == [f"delta: {line}", f"delta@v2: {line}"]
    saved_again(stored, dropped=None)
    assert loads(stored) == []


def test_strange_settings_end_in_one_line_of_the_command(canary, stored, monkeypatch, capsys):
    monkeypatch.setenv("PEFTKIT_REGISTRY", str(stored[1].root))
    saved_again(stored, peft_type="peftkit_canary")
    assert main(["predict", "delta", "good"]) == 1
    assert capsys.readouterr().err.startswith("delta: PEFT refuses it: ")


@pytest.mark.parametrize(
    "changes",
    [
        {"task": {"type": "peftkit_canary"}},
        {"task": {"type": "classification", "dataset": "!!python/object/apply:os.system [x]"}},
        {"model": {"auto_class": "peftkit_canary", "config": {}, "dropout": None} | HELD},
        {"model": {"auto_class": "AutoModelForCausalLM.register", "config": {}} | HELD},
        {"model": {"auto_class": AUTO_CLASS, "config": {"auto_map": "x"}, "dropout": None} | HELD},
        {"model": {"auto_class": AUTO_CLASS, "mixed_precision": "peftkit_canary"}},
        {"model": {}},
        {"task": {}},
        {"recipe": {}},
        {"recipe": {"base": {"name": "peftkit_canary", "trust_remote_code": True}}},
        {"recipe": {"base": {"name": "org/x", "offline": "package:peftkit_canary/x#sha256=0"}}},
        {"base_config": {"auto_map": {"AutoConfig": "peftkit_canary.Evil"}}},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_a_strange_info_runs_nothing_and_is_refused(changes, canary, stored):
    told_otherwise(stored, **changes)
    with pytest.raises(PeftkitError):
        load_delta("delta", registry=stored[1])


@pytest.mark.parametrize(
    "tag", ["python/object/apply:os.system", "python/name:peftkit_canary.x", "python/module:os"]
)
def test_tags_of_python_in_a_recipe_run_nothing(tag, canary, tmp_path):
    recipe = tmp_path / "evil.yaml"
    recipe.write_text(f'name: !!{tag} ["touch {canary}"]\nbase: !!{tag} "touch {canary}"\n')
    with pytest.raises(PeftkitError):
        load_recipe(recipe)


def test_metadata_is_only_read(canary, tmp_path):
    registry = Registry(tmp_path / "registry")
    told = info("adapter").model_copy(
        update={"labels": [template(canary), "!!python/module:peftkit_canary"], "method": {}}
    )
    settings = {"peft_type": "LORA", "note": template(canary)}
    registry.save("odd", Delta("adapter", {"w": torch.ones(1)}, settings), told)
    export_archive(registry, ["odd"], tmp_path / "odd.tar")
    (taken,) = import_archive(Registry(tmp_path / "other"), tmp_path / "odd.tar")
    assert taken.info.labels == told.labels
