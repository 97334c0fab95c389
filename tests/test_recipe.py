import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from peftkit.errors import RecipeError
from peftkit.recipe import (
    Recipe,
    from_resolved,
    load_recipe,
    recipe_model,
    resolved_yaml,
)

TEXT = """\
# A comment.
base:
  name: somewhere/base
task:
  type: classification
  dataset: somewhere/data
  text_columns: [sentence]
  labels: [negative, positive]
  metrics: [accuracy]
method:
  type: lora
  r: 8
  lora_alpha: 16
training:
  learning_rate: 1e-4
  num_train_epochs: 3
"""
METHODS = "full, lora, peft, qlora, top_layers"
TOP = "base, method, name, output_dir, seed, task, training"


@pytest.fixture
def folder(workplace):
    (workplace / "recipes").mkdir()
    return workplace


def load(text=TEXT, overrides=(), name="x"):
    path = Path("recipes", f"{name}.yaml")
    path.write_text(text)
    return load_recipe(path, overrides)


def problems(text=TEXT, overrides=()):
    with pytest.raises(RecipeError) as caught:
        load(text, overrides)
    return caught.value.problems


def changed(old, new):
    assert TEXT.count(old) == 1
    return TEXT.replace(old, new)


def test_a_recipe_is_read_with_its_defaults(folder):
    recipe = load()
    assert isinstance(recipe, Recipe)
    assert recipe.name == "x"
    assert recipe.training.learning_rate == 1e-4
    assert recipe.training.num_train_epochs == 3.0
    assert (recipe.method.type, recipe.method.r, recipe.method.lora_dropout) == ("lora", 8, 0.0)
    assert recipe.task.labels == ["negative", "positive"]
    assert recipe.run_folder == Path("runs/x-seed0")


@pytest.mark.parametrize(
    ("file", "name"), [("My Recipe", "my_recipe"), ("a.b-c_1", "a.b-c_1"), ("Ünïx", "_n_x")]
)
def test_the_name_is_that_of_the_file_unless_written(folder, file, name):
    if name.startswith("_"):
        with pytest.raises(RecipeError) as raised:
            load(name=file)
        assert str(raised.value) == (
            f"recipes/{file}.yaml: from the file's name, as the recipe has none: name: "
            '"_n_x" (text): '
            "expected 1 to 63 characters of a-z, 0-9, '.', '_' and '-', the first a letter or a "
            "digit, such as 'reviews-lora'"
        )
    else:
        assert load(name=file).name == name
    assert load(f"name: other\n{TEXT}", name=file).name == "other"


@pytest.mark.parametrize("name", ["v1", "latest", "con", "a."])
def test_a_name_that_the_registry_would_refuse_is_refused_before_the_run(folder, name):
    (problem,) = problems(f"name: {name}\n{TEXT}")
    assert re.match(rf'recipes/x\.yaml:\d+: name: "{re.escape(name)}" \(text\): ', problem)


def test_unusable_overrides_do_not_hide_the_other_problems(folder):
    overrides = ["foo", "base.name.x=1", "training.learning_rate=abc", "training.lerning_rate=1"]
    starts = [problem.partition(": ")[0] for problem in problems(overrides=overrides)]
    assert starts == [f"override '{override}'" for override in overrides]


@pytest.mark.parametrize(
    ("key", "value"),
    [("early_stopping_patience", 1), ("metric_for_best_model", "loss"), ("eval_steps", 5)],
)
def test_what_needs_held_out_rows_is_refused_without_them(folder, key, value):
    override = f"training.{key}={value}"
    assert problems(overrides=["task.holdout_fraction=0", override]) == [
        f"override '{override}': training.{key}: needs held-out rows; "
        "set task.holdout_fraction above 0"
    ]


def test_the_direction_of_an_unknown_metric_has_to_be_said(folder):
    text = changed("metrics: [accuracy]", "metrics: [wer]")
    (problem,) = problems(text)
    assert problem.endswith(
        "training.greater_is_better: must be true or false, as the best checkpoint is chosen by "
        "'wer', whose direction peftkit does not know"
    )
    load(text, ["training.greater_is_better=false"])
    load(text, ["task.holdout_fraction=0"])


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("base.name=' '", "base.name: empty; give a path or <org>/<name>"),
        ("base.offline=foo", "base.offline: 'foo' does not fit a model; write package:"),
    ],
)
def test_a_base_that_cannot_be_looked_for_is_refused(folder, override, problem):
    (found,) = problems(overrides=[override])
    assert found.startswith(f"override '{override}': {problem}")


def test_a_recipe_is_frozen(folder):
    recipe = load()
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            "lora_alpha: 16",
            "lora_aplha: 16",
            "13: method.lora_aplha: unknown key; did you mean 'lora_alpha'? Choices: ",
        ),
        (
            "# A comment.",
            "sed: 3",
            f"1: sed: unknown key; did you mean 'seed'? Choices: {TOP}",
        ),
        (
            "  name: somewhere/base",
            "  name: b\n  nmae: c",
            "4: base.nmae: unknown key; did you mean 'name'? Choices: name, offline, revision",
        ),
        ("  learning_rate: 1e-4\n", "", "14: training.learning_rate: missing key"),
        ("  name: somewhere/base\n", "  revision: main\n", "2: base.name: missing key"),
        ("base:\n  name: somewhere/base\n", "", "2: base: missing key"),
        ("  type: lora\n", "", f"10: method.type: missing key; Choices: {METHODS}"),
        (
            "type: lora",
            "type: loar",
            "11: method.type: method 'loar' is unknown; did you mean 'lora'? Choices: " + METHODS,
        ),
        (
            "type: classification",
            "type: clasification",
            "5: task.type: task 'clasification' is unknown; did you mean 'classification'? "
            "Choices: classification, sft",
        ),
        (
            "type: lora",
            "type: 3",
            f"11: method.type: must be a name, found 3 (number); Choices: {METHODS}",
        ),
        (
            "type: lora",
            "type: [lora]",
            f'11: method.type: must be a name, found ["lora"]; Choices: {METHODS}',
        ),
        (
            "1e-4",
            "fast",
            '15: training.learning_rate: must be a valid number, found "fast" (text)',
        ),
        (
            "1e-4",
            '"1e-4"',
            '15: training.learning_rate: must be a valid number, found "1e-4" (text)',
        ),
        ("1e-4", "0", "15: training.learning_rate: must be greater than 0, found 0 (number)"),
        (
            "1e-4",
            ".nan",
            "15: training.learning_rate: must be a finite number, found NaN (number)",
        ),
        ("r: 8", "r: 8.0", "12: method.r: must be a valid integer, found 8.0 (number)"),
        ("r: 8", "r: true", "12: method.r: must be a valid integer, found true (true/false)"),
        ("r: 8", "r:", "12: method.r: must be a valid integer, found null (null)"),
        (
            "[sentence]",
            "[]",
            "7: task.text_columns: must have at least 1 item after validation, not 0, found []",
        ),
        (
            "[sentence]",
            "\n    - first\n    - 2",
            "9: task.text_columns.1: must be a valid string, found 2 (number)",
        ),
        (
            "r: 8",
            "target_modules: 3",
            "12: method.target_modules: must be a valid list or a valid string, found 3 (number)",
        ),
        (
            "r: 8",
            "target_modules: [a, 3]",
            "12: method.target_modules.1: must be a valid string, found 3 (number)",
        ),
        (
            "r: 8",
            "init_lora_weights: pissa\n  use_dora: true",
            "12: method.init_lora_weights: pissa changes the base's weights and is stored as "
            "plain LoRA, which use_dora and use_rslora do not allow",
        ),
        (
            "num_train_epochs: 3",
            "metric_for_best_model: acuracy",
            "16: training.metric_for_best_model: 'acuracy' is no metric of the task; "
            "did you mean 'accuracy'? Choices: accuracy, loss",
        ),
        (
            "metrics: [accuracy]",
            "metrics: [accuracy]\n  offline: package:x",
            "10: task.offline: ",
        ),
        (
            "r: 8",
            "r: 8\n  r: 16",
            "13: method.r: duplicate key, first on line 12",
        ),
    ],
)
def test_one_problem_is_one_whole_line(folder, old, new, problem):
    (found,) = problems(changed(old, new))
    if problem.endswith(": "):
        assert found.startswith(f"recipes/x.yaml:{problem}")
    else:
        assert found == f"recipes/x.yaml:{problem}"


def test_the_message_of_an_unknown_key_lists_every_key_of_its_section(folder):
    from peftkit.methods.lora import LoraConfig

    (found,) = problems(changed("lora_alpha: 16", "lora_aplha: 16"))
    assert found == (
        "recipes/x.yaml:13: method.lora_aplha: unknown key; did you mean 'lora_alpha'? Choices: "
        + ", ".join(sorted(LoraConfig.model_fields))
    )


@pytest.mark.parametrize("section", ["base", "task", "method", "training"])
@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("lora", '"lora" (text)'),
        ("", "null (null)"),
        ("[a]", '["a"]'),
        ("3", "3 (number)"),
    ],
)
def test_a_section_that_is_no_mapping_is_refused(folder, section, value, found):
    content = {**yaml.safe_load(TEXT), "training": {"learning_rate": 1.0}}
    content.pop(section)
    text = f"{section}: {value}\n" + yaml.safe_dump(content)
    assert problems(text) == [f"recipes/x.yaml:1: {section}: must be a mapping, found {found}"]


def test_all_problems_come_at_once_sorted_by_line(folder):
    text = (
        TEXT.replace("type: lora", "type: loar")
        .replace("1e-4", "fast")
        .replace("[sentence]", "sentence")
        .replace("  name: somewhere/base\n", "  nam: b\n")
    )
    assert problems(
        f"{text}  warmup_stesp: 3\nseed: -1\n", ["sede=3", "training.momentum=high"]
    ) == [
        f"override 'sede=3': sede: unknown key; did you mean 'seed'? Choices: {TOP}",
        "override 'training.momentum=high': training.momentum: must be a valid number, "
        'found "high" (text)',
        "recipes/x.yaml:2: base.name: missing key",
        "recipes/x.yaml:3: base.nam: unknown key; did you mean 'name'? "
        "Choices: name, offline, revision",
        'recipes/x.yaml:7: task.text_columns: must be a valid list, found "sentence" (text)',
        "recipes/x.yaml:11: method.type: method 'loar' is unknown; did you mean 'lora'? "
        f"Choices: {METHODS}",
        'recipes/x.yaml:15: training.learning_rate: must be a valid number, found "fast" (text)',
        *[p for p in problems(f"{TEXT}  warmup_stesp: 3\n") if ":17: training.warmup_stesp: " in p],
        "recipes/x.yaml:18: seed: must be greater than or equal to 0, found -1 (number)",
    ]


def test_duplicates_are_named_with_both_lines(folder):
    assert problems(f"{TEXT}base: 1\n") == [
        "recipes/x.yaml:17: base: duplicate key, first on line 2"
    ]


def test_only_so_many_problems_are_worded(folder):
    found = problems(TEXT + "".join(f"key{i}: 1\n" for i in range(150)))
    assert len(found) == 101
    assert found[-1] == "recipes/x.yaml: 50 more problems are not listed"


def test_words_that_yaml_1_1_took_for_truth_values_stay_text(folder):
    recipe = load(changed("[negative, positive]", "[no, yes]"))
    assert recipe.task.labels == ["no", "yes"]
    assert load(TEXT, ["training.mixed_precision=no"]).training.mixed_precision == "no"


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("seed=7", lambda r: r.seed, 7),
        ("training.learning_rate=5e-4", lambda r: r.training.learning_rate, 5e-4),
        ("training.learning_rate=1", lambda r: r.training.learning_rate, 1.0),
        ("training.max_grad_norm=null", lambda r: r.training.max_grad_norm, None),
        ("method={type: full}", lambda r: r.method.type, "full"),
        ("method.target_modules=[a, b]", lambda r: r.method.target_modules, ["a", "b"]),
        ("method.rank_pattern.query=4", lambda r: r.method.rank_pattern, {"query": 4}),
        ("base.name=a=b", lambda r: r.base.name, "a=b"),
        ("name='1e-4'", lambda r: r.name, "1e-4"),
    ],
)  # fmt: skip
def test_overrides_replace_values(folder, override, read, value):
    assert read(load(TEXT, [override])) == value


def test_the_last_of_two_overrides_counts(folder):
    assert load(TEXT, ["seed=1", "seed=2"]).seed == 2
    recipe = load(TEXT, ["method={type: lora}", "method.r=2"])
    assert (recipe.method.r, recipe.method.lora_alpha) == (2, 16)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("seed", ": must be key=value, e.g. training.max_steps=10"),
        ("=3", ": must be key=value, e.g. training.max_steps=10"),
        ("training..seed=3", ": must be key=value, e.g. training.max_steps=10"),
        ("base.name.x=3", ": 'base.name.x' is not inside a section"),
        ("seed=[1", ":1: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("seed={a: 1, a: 2}", ":1: a: duplicate key, first on line 1"),
        ("seed=*x", ":1: anchors and aliases are not allowed; write the value out"),
        ("seed=one", ': seed: must be a valid integer, found "one" (text)'),
        ("seed.x=1", ": seed: must be a valid integer, found a mapping"),
        ("training=5", ": training: must be a mapping, found 5 (number)"),
        ("method=full", ': method: must be a mapping, found "full" (text)'),
        ("method={r: 8}", f": method.type: missing key; Choices: {METHODS}"),
        ("method.type=loar", ": method.type: method 'loar' is unknown; did you mean 'lora'? "
         f"Choices: {METHODS}"),
        ("sede=3", f": sede: unknown key; did you mean 'seed'? Choices: {TOP}"),
        ("base.nmae=3", ": base.nmae: unknown key; did you mean 'name'? "
         "Choices: name, offline, revision"),
        ("training.metric_for_best_model=f1", ": training.metric_for_best_model: 'f1' is no metric "
         "of the task; Choices: accuracy, loss"),
    ],
)  # fmt: skip
def test_a_bad_override_is_named(folder, override, problem):
    assert problems(TEXT, [override]) == [f"override '{override}'{problem}"]


def test_every_malformed_override_is_listed(folder):
    assert problems(TEXT, ["seed", "a\nb", "base.name.x=1"]) == [
        "override 'seed': must be key=value, e.g. training.max_steps=10",
        "override 'a\\nb': must be key=value, e.g. training.max_steps=10",
        "override 'base.name.x=1': 'base.name.x' is not inside a section",
    ]


def test_keys_of_the_old_method_are_refused_when_an_override_changes_it(folder):
    found = problems(TEXT, ["method.type=full"])
    assert found == [
        "recipes/x.yaml:12: method.r: unknown key; Choices: layerwise_lr_decay, type",
        "recipes/x.yaml:13: method.lora_alpha: unknown key; Choices: layerwise_lr_decay, type",
    ]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", ": must be a mapping with the keys base, task, method, training"),
        (b"# note\n", ": must be a mapping with the keys base, task, method, training"),
        (b"- a\n", ": must be a mapping with the keys base, task, method, training"),
        (b"a: 1\nb: \xff\n", ":2: not UTF-8 text"),
        (b"a: 1\n\x00", ":2: not valid YAML: character #x0000 is not allowed"),
        (b"x" * 300_000, ": larger than 262144 bytes"),
        (b"\xff" * 300_000, ": larger than 262144 bytes"),
    ],
)
def test_files_that_are_no_recipe(folder, content, problem):
    Path("recipes/x.yaml").write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(Path("recipes/x.yaml"))
    assert caught.value.problems == [f"recipes/x.yaml{problem}"]


def test_files_that_cannot_be_read(folder):
    for path, reason in ("absent.yaml", "No such file or directory"), ("recipes", "Is a directory"):
        with pytest.raises(RecipeError) as caught:
            load_recipe(Path(path))
        assert caught.value.problems == [f"{path}: cannot be read: {reason}"]


def test_loading_a_recipe_imports_nothing_heavy(folder):
    Path("recipes/x.yaml").write_text(TEXT)
    code = (
        "import sys; from pathlib import Path; from peftkit.recipe import load_recipe;"
        "load_recipe(Path('recipes/x.yaml'), ['training.metric_for_best_model=accuracy']);"
        "heavy = 'torch transformers peft datasets evaluate sklearn accelerate bitsandbytes';"
        "sys.exit(' '.join(sorted(set(heavy.split()) & set(sys.modules))) or 0)"
    )
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def leaves(content, path=()):
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key)


def another(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 0.5 if isinstance(value, float) else value + 1
    return [*value, "more"] if isinstance(value, list) else f"{value}x"


def test_the_digest_depends_on_everything_but_name_folder_and_trackers(folder):
    recipe = load()
    content = recipe.resolved()
    same = {("name",), ("output_dir",), ("training", "report_to")}
    paths = list(leaves(content))
    assert len(paths) > 50
    for path in paths:
        section = content
        for part in path[:-1]:
            section = section[part]
        new = another(section[path[-1]])
        # The values need not be valid: the digest is of the text.
        parts = [recipe]
        for part in path[:-1]:
            parts.append(getattr(parts[-1], part))
        for part, key in zip(reversed(parts), reversed(path), strict=True):
            new = part.model_copy(update={key: new})
        assert (warning_free_digest(new) == recipe.digest()) == (path in same), path
    assert recipe.digest().startswith("sha256:")
    assert len(recipe.digest()) == 71


def warning_free_digest(recipe):
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Pydantic serializer warnings")
        return recipe.digest()


def test_the_digest_does_not_depend_on_how_the_recipe_is_written(folder):
    reordered = yaml.safe_dump(yaml.safe_load(TEXT.replace("1e-4", "0.0001")), sort_keys=True)
    assert load(reordered, name="other").digest() == load().digest()
    assert load(changed("num_train_epochs: 3", "num_train_epochs: 3.0")).digest() == load().digest()
    explicit = f"{TEXT}  weight_decay: 0.01\nseed: 0\noutput_dir: elsewhere\n"
    assert load(explicit).digest() == load().digest()


@pytest.mark.parametrize("method", METHODS.split(", "))
def test_the_resolved_recipe_loads_as_the_same_recipe(folder, method):
    sections = {
        "full": "{type: full, layerwise_lr_decay: 0.9}",
        "peft": "{type: peft, peft_type: IA3}",
        "top_layers": "{type: top_layers, num_layers: 2}",
    }
    section = sections.get(method, f"{{type: {method}, rank_pattern: {{'08': 4}}}}")
    recipe = load(TEXT, [f"method={section}", "task.labels=['1e-4', 'no', '08']", "name='1e5'"])
    text = resolved_yaml(recipe)
    again = load(text, name="resolved")
    assert again == recipe
    assert again.digest() == recipe.digest()
    assert resolved_yaml(again) == text
    assert from_resolved(recipe.resolved()) == recipe


def test_a_stored_recipe_that_no_longer_fits_is_named(folder):
    content = load().resolved()
    content["method"]["lora_aplha"] = content["method"].pop("lora_alpha")
    content["training"]["learning_rate"] = "fast"
    with pytest.raises(RecipeError) as caught:
        from_resolved(content)
    first, second = caught.value.problems
    assert first.startswith("stored recipe: method.lora_aplha: unknown key; did you mean 'lora_a")
    assert second == (
        'stored recipe: training.learning_rate: must be a valid number, found "fast" (text)'
    )


def test_the_json_schema_describes_every_section_and_refuses_other_keys(folder):
    schema = recipe_model().model_json_schema()
    assert schema["required"] == ["name", "base", "task", "method", "training"]
    assert set(schema["properties"]) == set(TOP.split(", "))
    mapping = schema["properties"]["method"]["discriminator"]["mapping"]
    assert sorted(mapping) == METHODS.split(", ")
    for title, definition in {"Recipe": schema, **schema["$defs"]}.items():
        # The keys of `method: {type: peft}` are those of any PEFT config.
        assert definition["additionalProperties"] is (title == "PeftConfig"), title
        for name, field in definition["properties"].items():
            assert {"type", "anyOf", "$ref", "const", "enum", "oneOf"} & set(field), name
    for target in [*mapping.values(), schema["properties"]["training"]["$ref"]]:
        assert target.removeprefix("#/$defs/") in schema["$defs"]
    training = schema["$defs"]["TrainingConfig"]["properties"]
    assert training["learning_rate"]["exclusiveMinimum"] == 0.0
    assert training["warmup_steps"]["description"] == (
        "Optimizer steps of linear warm-up; below 1, a fraction of all steps."
    )


def test_the_model_of_the_schema_accepts_and_refuses_what_loading_does(folder):
    model = recipe_model()
    content = load().resolved()
    assert model.model_validate(content).resolved() == content
    for section, key in ("method", "aplha"), ("task", "datset"), ("training", "lr"), ("base", "x"):
        with pytest.raises(ValueError, match=key):
            model.model_validate({**content, section: {**content[section], key: 1}})


def test_a_valid_tiny_recipe_is_accepted(tiny_recipe):
    assert from_resolved(tiny_recipe).task.holdout_fraction == 0.1
