"""`validate`, `show`, `schema`, `ls`, `cp` and `plugins`."""

import json

import pytest
import yaml

from peftkit import plugins
from peftkit.cli import main, shipped

RECIPE = """\
# What does LoRA reach on a toy?
base:
  name: some/base
task:
  type: classification
  dataset: some/data
  text_columns: [sentence]
method:
  type: lora
training:
  learning_rate: 1e-3
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def bad_recipe(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(RECIPE.replace("name: some", "nmae: some").replace("1e-3", "fast"))
    return path


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    folder = tmp_path / "shipped"
    (folder / "paper").mkdir(parents=True)
    (folder / "toy.yaml").write_text(RECIPE)
    (folder / "paper" / "full.yaml").write_text("base: {}\n")
    monkeypatch.setattr(shipped, "recipes_folder", lambda: folder)
    monkeypatch.chdir(tmp_path)
    return folder


def test_validate_accepts_a_good_recipe(recipe, capsys):
    assert main(["validate", str(recipe)]) == 0
    assert capsys.readouterr() == (f"{recipe}: valid\n", "")


def test_validate_lists_the_problems_of_all_recipes(recipe, bad_recipe, capsys):
    assert main(["validate", str(bad_recipe), str(recipe), "none.yaml"]) == 2
    out, err = capsys.readouterr()
    assert out == f"{bad_recipe}: 3 problems\n{recipe}: valid\nnone.yaml: 1 problem\n"
    assert f"{bad_recipe}:3: base.nmae: unknown key; did you mean 'name'?" in err
    assert f"{bad_recipe}:11: training.learning_rate: must be" in err
    assert err.endswith("none.yaml: cannot be read: No such file or directory\n")
    assert len(err.splitlines()) == 4


def test_validate_as_json_says_the_same(recipe, bad_recipe, capsys):
    assert main(["validate", "--json", str(recipe), str(bad_recipe)]) == 2
    found = json.loads(capsys.readouterr().out)
    assert [(row["recipe"], row["valid"]) for row in found] == [
        (str(recipe), True),
        (str(bad_recipe), False),
    ]
    assert len(found[1]["problems"]) == 3


def test_show_fills_in_defaults_and_overrides(recipe, capsys):
    assert main(["show", str(recipe), "method.r=4", "seed=7"]) == 0
    as_yaml = yaml.safe_load(capsys.readouterr().out)
    assert main(["show", str(recipe), "method.r=4", "seed=7", "--json"]) == 0
    as_json = json.loads(capsys.readouterr().out)
    assert as_yaml == as_json
    assert (as_json["name"], as_json["method"]["r"], as_json["seed"]) == ("toy", 4, 7)
    assert as_json["training"]["per_device_train_batch_size"] == 32


def test_show_refuses_a_bad_override(recipe, capsys):
    assert main(["show", str(recipe), "method.rr=4"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("override 'method.rr=4': method.rr: unknown key; did you mean 'r'?")


def test_schema_asks_for_no_name_since_the_file_gives_one(capsys):
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(schema["required"]) == {"base", "task", "method", "training"}
    assert schema["additionalProperties"] is False


def test_ls_shows_names_and_first_comments(recipes, capsys):
    assert main(["ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["recipe", "description"],
        ["paper/full"],
        ["toy", *["What", "does", "LoRA", "reach", "on", "a", "toy?"]],
    ]
    assert main(["ls", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[1] == {
        "name": "toy",
        "description": "What does LoRA reach on a toy?",
        "path": str(recipes / "toy.yaml"),
    }


def test_the_shipped_recipes_are_found_from_the_checkout():
    assert shipped.recipes_folder().is_dir()
    assert "lora_sst2" in {recipe.name for recipe in shipped.shipped_recipes()}


@pytest.mark.parametrize("destination", [[], ["."], ["full.yaml"]])
def test_cp_copies_byte_for_byte(destination, recipes, tmp_path, capsys):
    assert main(["cp", "paper/full", *destination]) == 0
    assert capsys.readouterr().out == "full.yaml\n"
    assert (tmp_path / "full.yaml").read_bytes() == (recipes / "paper" / "full.yaml").read_bytes()


def test_cp_never_writes_over_a_file(recipes, tmp_path, capsys):
    (tmp_path / "toy.yaml").write_text("mine")
    assert main(["cp", "toy"]) == 2
    assert capsys.readouterr().err == "toy.yaml: exists already; name another file or remove it\n"
    assert (tmp_path / "toy.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tyo"], "recipe 'tyo' is unknown; did you mean 'toy'? Choices: paper/full, toy\n"),
        (["toy", "none/toy.yaml"], "none: no such folder; create it or name another\n"),
    ],
)
def test_cp_refuses_what_it_cannot_do(arguments, said, recipes, capsys):
    assert main(["cp", *arguments]) == 2
    assert capsys.readouterr().err == said


def test_plugins_names_a_broken_one_beside_the_others(monkeypatch, capsys):
    broken = plugins.PluginInfo("methods", "odd", "odd-package", "cannot be imported: x")
    monkeypatch.setattr(plugins, "listing", lambda: [broken, plugins.PluginInfo("tasks", "t", "p")])
    assert main(["plugins"]) == 0
    assert [line.split(maxsplit=4) for line in capsys.readouterr().out.splitlines()] == [
        ["group", "name", "origin", "state", "error"],
        ["methods", "odd", "odd-package", "broken", "cannot be imported: x"],
        ["tasks", "t", "p", "ok"],
    ]


def test_plugins_lists_what_is_built_in(capsys):
    assert main(["plugins", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    found = {(row["group"], row["name"]) for row in rows if row["origin"] == "peftkit"}
    methods = {("methods", name) for name in ("full", "top_layers", "lora", "qlora", "peft")}
    assert methods | {("tasks", "classification")} <= found
