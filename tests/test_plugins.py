import importlib
import sys

import pytest

from peftkit import plugins
from peftkit.errors import RecipeError, UsageError
from peftkit.plugins import PluginInfo
from peftkit.recipe import from_resolved, load_recipe, recipe_model

GOOD = """
from typing import Literal

from peftkit.schema import Section


class MethodConfig(Section):
    type: Literal["scale"]
    strength: float = 0.5


class Scale:
    Config = MethodConfig

    def __init__(self, config):
        self.config = config


class TaskConfig(Section):
    type: Literal["parity"]
    bits: int = 8


class Parity:
    Config = TaskConfig
    metric_names = ["exact"]

    def __init__(self, config):
        self.config = config
"""
BROKEN = """
from typing import Literal

from pydantic import BaseModel

from peftkit.schema import Section


class NoConfig:
    pass


class Loose:
    class Config(BaseModel):
        type: Literal["loose"]


class NoType:
    class Config(Section):
        strength: float = 0.5


class AnyType:
    class Config(Section):
        type: str


class OtherType:
    class Config(Section):
        type: Literal["lora"]
"""
RECIPE = """\
base:
  name: somewhere/base
task:
  type: parity
  bits: 4
method:
  type: scale
training:
  learning_rate: 1e-3
  metric_for_best_model: exact
"""


@pytest.fixture
def forget():
    """Discovery is cached for the life of a process; these tests change what there is to find."""
    caches = (plugins._targets, plugins._import)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def install(tmp_path, monkeypatch, forget):
    """Puts a package on the path as pip leaves it: modules and a dist-info folder."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def write(distribution, *, modules, entries):
        for module, source in modules.items():
            (site / f"{module}.py").write_text(source)
            monkeypatch.delitem(sys.modules, module, raising=False)
        info = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n"
        )
        lines = [
            f"[peftkit.{group}]\n" + "".join(f"{name} = {to}\n" for name, to in named.items())
            for group, named in entries.items()
        ]
        (info / "entry_points.txt").write_text("\n".join(lines))
        importlib.invalidate_caches()

    return write


@pytest.fixture
def third_party(install):
    install(
        "peftkit-parity",
        modules={"pk_parity": GOOD},
        entries={"methods": {"scale": "pk_parity:Scale"}, "tasks": {"parity": "pk_parity:Parity"}},
    )


def broken(install, target, *, name="broken", source=BROKEN, group="methods"):
    install("peftkit-broken", modules={"pk_broken": source}, entries={group: {name: target}})
    row = next(row for row in plugins.listing() if row.name == name)
    assert (row.group, row.origin) == (group, "peftkit-broken")
    return row.error


def test_built_in_methods_and_tasks_are_all_usable():
    assert {"full", "lora", "peft", "qlora", "top_layers"} <= set(plugins.names("methods"))
    assert "classification" in plugins.names("tasks")
    own = [row for row in plugins.listing() if row.origin == "peftkit"]
    assert [row for row in own if row.error] == []
    for row in own:
        assert plugins.load(row.group, row.name).__module__.startswith(f"peftkit.{row.group}")


def test_an_installed_package_adds_a_method_and_a_task(third_party, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    recipe = load_recipe(path, ["method.strength=0.25"])
    assert (recipe.method.type, recipe.method.strength) == ("scale", 0.25)
    assert (recipe.task.type, recipe.task.bits) == ("parity", 4)
    assert type(recipe.method).__module__ == "pk_parity"
    assert recipe.resolved()["task"] == {"type": "parity", "bits": 4}
    assert from_resolved(recipe.resolved()) == recipe
    assert PluginInfo("methods", "scale", "peftkit-parity") in plugins.listing()
    assert PluginInfo("tasks", "parity", "peftkit-parity") in plugins.listing()


def test_problems_of_a_plugin_section_are_worded_like_the_built_in_ones(third_party, tmp_path):
    path = tmp_path / "mine.yaml"
    changed = RECIPE.replace("bits: 4", "bits: four").replace("scale\n", "scale\n  strenght: 1.0\n")
    path.write_text(changed.replace("exact", "exakt"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert caught.value.problems == [
        f'{path}:5: task.bits: must be a valid integer, found "four" (text)',
        f"{path}:8: method.strenght: unknown key; did you mean 'strength'? Choices: strength, type",
    ]
    path.write_text(RECIPE.replace("exact", "exakt"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert caught.value.problems == [
        f"{path}:10: training.metric_for_best_model: 'exakt' is no metric of the task; "
        "did you mean 'exact'? Choices: exact, loss"
    ]


def test_the_schema_includes_plugins(third_party):
    definitions = recipe_model().model_json_schema()["$defs"]
    assert {"MethodConfig", "TaskConfig", "LoraConfig", "ClassificationConfig"} <= set(definitions)


def test_the_nearest_name_may_be_a_plugin(third_party):
    with pytest.raises(UsageError) as caught:
        plugins.load("methods", "scal")
    assert str(caught.value) == (
        "method 'scal' is unknown; did you mean 'scale'? "
        "Choices: full, lora, peft, qlora, scale, top_layers"
    )


@pytest.mark.parametrize(
    ("name", "target", "error"),
    [
        ("broken", "pk_broken:NoConfig", "has no Config that derives from peftkit.schema.Section"),
        ("loose", "pk_broken:Loose", "has no Config that derives from peftkit.schema.Section"),
        ("broken", "pk_broken:NoType", "its Config lacks the field `type: Literal['broken']`"),
        ("broken", "pk_broken:AnyType", "its Config lacks the field `type: Literal['broken']`"),
        ("broken", "pk_broken:OtherType", "its Config lacks the field `type: Literal['broken']`"),
        (
            "broken",
            "pk_broken:Nothing",
            "cannot be imported: AttributeError: module 'pk_broken' has no attribute 'Nothing'",
        ),
        (
            "broken",
            "pk_absent:X",
            "cannot be imported: ModuleNotFoundError: No module named 'pk_absent'",
        ),
    ],
)
def test_an_unfit_plugin_is_named_with_its_error_and_skipped(install, name, target, error):
    assert broken(install, target, name=name) == error
    assert name not in plugins.names("methods")
    assert "lora" in plugins.names("methods")
    with pytest.raises(UsageError) as caught:
        plugins.load("methods", name)
    assert str(caught.value) == f"method '{name}' (peftkit-broken): {error}"
    recipe_model().model_json_schema()


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("raise RuntimeError('no\\n  GPU')", "cannot be imported: RuntimeError: no GPU"),
        ("import sys; sys.exit(3)", "cannot be imported: SystemExit: 3"),
        ("1 / 0", "cannot be imported: ZeroDivisionError: division by zero"),
    ],
)
@pytest.mark.parametrize("group", ["methods", "tasks"])
def test_a_plugin_that_fails_at_import_harms_no_other(install, third_party, source, error, group):
    assert broken(install, "pk_broken:X", source=source, group=group) == error
    assert {"lora", "scale"} <= set(plugins.names("methods"))
    assert {"classification", "parity"} <= set(plugins.names("tasks"))
    assert plugins.load("methods", "scale").__name__ == "Scale"
    assert {row.name for row in plugins.listing() if row.error} == {"broken"}


def test_a_recipe_for_a_broken_plugin_says_what_is_wrong_with_it(install, tmp_path):
    broken(install, "pk_broken:NoConfig")
    path = tmp_path / "x.yaml"
    path.write_text(RECIPE.replace("scale", "broken").replace("parity\n  bits: 4", "broken"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert caught.value.problems == [
        f"{path}:4: task.type: task 'broken' is unknown; Choices: classification, sft",
        f"{path}:6: method.type: method 'broken' (peftkit-broken): "
        "has no Config that derives from peftkit.schema.Section",
    ]


def test_a_built_in_name_cannot_be_taken_over(install):
    source = GOOD.replace('"scale"', '"lora"')
    install(
        "peftkit-thief",
        modules={"pk_thief": source},
        entries={"methods": {"lora": "pk_thief:Scale"}},
    )
    assert plugins.load("methods", "lora").__module__ == "peftkit.methods.lora"
    assert "pk_thief" not in sys.modules
    rows = [row for row in plugins.listing() if row.name == "lora"]
    assert rows == [PluginInfo("methods", "lora", "peftkit")]
