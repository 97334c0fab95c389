"""What is to be compared: seeds, YAML, the command line over it; every refusal with its message."""

import os
from pathlib import Path

import pytest
import yaml

from peftkit.cli import main
from peftkit.cli.comparison_plan import planned_runs, read_plan
from peftkit.errors import PeftkitError


@pytest.fixture
def recipes(workplace, tiny_recipe):
    """`recipes/a.yaml` and `recipes/b.yaml`, named by their files."""
    del tiny_recipe["name"]
    (workplace / "recipes").mkdir()
    for name in ("a", "b"):
        (workplace / "recipes" / f"{name}.yaml").write_text(yaml.safe_dump(tiny_recipe))
    return workplace


def plan_file(text, name="plan.yaml"):
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text(text)
    return name


def problems(words, **options):
    with pytest.raises(PeftkitError) as refused:
        planned_runs(read_plan(words, options))
    assert refused.value.exit_code == 2
    return refused.value.problems


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("3", [0, 1, 2]), ("1", [0]), ("0,5,7", [0, 5, 7]), ("5,", [5]), ("7,0", [7, 0])],
)
def test_seeds_are_a_number_or_a_list(text, seeds):
    assert read_plan(["a.yaml"], {"seeds": text}).seed_list() == seeds


@pytest.mark.parametrize("price", [-1.0, 1e300, float("inf"), float("nan")])
def test_a_price_that_is_no_amount_of_money_is_refused(price):
    (line,) = problems(["a.yaml"], price_per_hour=price)
    assert line.startswith(f"--price-per-hour {price}: price_per_hour: must be ")


def test_without_seeds_there_are_three():
    assert read_plan(["a.yaml"], {"seeds": None}).seed_list() == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("0", "--seeds 0: seeds: must be 1 to 1000 seeds, found 0"),
        ("1001", "--seeds 1001: seeds: must be 1 to 1000 seeds, found 1001"),
        ("0,1,0", "--seeds 0,1,0: seeds: 0 named more than once"),
        (
            "0,4294967296",
            "--seeds 0,4294967296: seeds: must be at least 0 and less than 4294967296, "
            "found 4294967296",
        ),
        *(
            (
                text,
                f"--seeds {text}: seeds: must be a valid integer or a valid list, "
                f'found "{text}" (text)',
            )
            for text in ("x", "1.5", "-1", "0,,1", ",", "", "0, 1")
        ),
    ],
)
def test_other_seeds_are_refused(text, line):
    assert problems(["a.yaml"], seeds=text) == [line]


def test_a_plan_is_read_from_yaml_and_its_recipes_lie_beside_it(recipes):
    file = plan_file(
        "recipes: [../recipes/a.yaml, ../recipes/b.yaml]\nseeds: [4, 2]\nout: found\njobs: 2\n"
        "price_per_hour: 1\noverrides:\n  training: {max_steps: 3, mixed_precision: bf16}\n"
        "  method.type: full\n",
        "plans/plan.yaml",
    )
    plan = read_plan([file], {})
    assert (plan.out, plan.jobs, plan.price_per_hour) == ("found", 2, 1.0)
    runs = planned_runs(plan)
    assert [(run.file, run.recipe.seed) for run in runs] == [
        ("recipes/a.yaml", 4),
        ("recipes/b.yaml", 4),
        ("recipes/a.yaml", 2),
        ("recipes/b.yaml", 2),
    ]
    assert str(runs[3].folder) == "found/runs/b-seed2"
    assert str(runs[3].output) == "found/runs/b-seed2.out"
    training = runs[0].recipe.training
    assert (training.max_steps, training.mixed_precision) == (3, "bf16")
    assert runs[0].script_arguments() == [
        "recipes/a.yaml",
        "training.max_steps=3",
        'training.mixed_precision="bf16"',
        'method.type="full"',
        'output_dir="found/runs"',
        "seed=4",
    ]


def test_the_command_line_wins_over_the_plan(recipes):
    file = plan_file(
        "recipes: [recipes/a.yaml]\nseeds: 2\nout: found\njobs: 2\nprice_per_hour: 1.0\n"
        "overrides: [training.max_steps=3]\n"
    )
    options = {"seeds": "5,", "out": "other", "jobs": 1, "price_per_hour": 9.0}
    plan = read_plan([file, "training.max_steps=4"], options)
    assert (plan.seed_list(), plan.out, plan.jobs, plan.price_per_hour) == ([5], "other", 1, 9.0)
    assert planned_runs(plan)[0].recipe.training.max_steps == 4


def test_an_absolute_recipe_stays_where_it_is(recipes):
    file = plan_file(f"recipes: [{recipes / 'recipes' / 'a.yaml'}]\n", "plans/plan.yaml")
    assert read_plan([file], {}).recipes == [str(recipes / "recipes" / "a.yaml")]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("seeds: 3\n", ["plan.yaml:1: recipes: missing key"]),
        (
            "recipies: [a.yaml]\nseeds: 3\n",
            [
                "plan.yaml:1: recipes: missing key",
                "plan.yaml:1: recipies: unknown key; did you mean 'recipes'? "
                "Choices: jobs, out, overrides, price_per_hour, recipes, seeds",
            ],
        ),
        (
            "recipes: []\nseeds: '3'\njobs: 0\nprice_per_hour: -1\nout: ''\n",
            [
                "plan.yaml:1: recipes: name at least one recipe",
                'plan.yaml:2: seeds: must be a valid integer or a valid list, found "3" (text)',
                "plan.yaml:3: jobs: must be greater than or equal to 1, found 0 (number)",
                "plan.yaml:4: price_per_hour: must be greater than or equal to 0, "
                "found -1 (number)",
                "plan.yaml:5: out: must name a folder, found ''",
            ],
        ),
        (
            "recipes: [a.yaml, 7]\nseeds:\n- 0\n- x\nout: plan.yaml\n",
            [
                "plan.yaml:1: recipes.1: must be a valid string, found 7 (number)",
                'plan.yaml:4: seeds.1: must be a valid integer, found "x" (text)',
                "plan.yaml:5: out: must name a folder, found 'plan.yaml'",
            ],
        ),
        (
            "recipes: [a.yaml]\noverrides: {seed: 1, output_dir: x}\n",
            ["plan.yaml:2: overrides: 'output_dir' is said by out; 'seed' is said by seeds"],
        ),
        (
            "recipes: [a.yaml]\noverrides: 3\n",
            [
                "plan.yaml:2: overrides: must be a mapping or a valid list, found 3 (number)",
            ],
        ),
        (
            "recipes: [a.yaml]\nseeds: true\n",
            [
                "plan.yaml:2: seeds: must be a valid integer or a valid list, "
                "found true (true/false)"
            ],
        ),
    ],
)
def test_a_bad_plan_is_refused_key_by_key(workplace, text, lines):
    assert problems([plan_file(text)]) == lines


def test_a_plan_among_recipes_is_refused(recipes):
    file = plan_file("recipes: [recipes/a.yaml]\n")
    assert problems([file, "recipes/a.yaml"]) == [
        "plan.yaml: is the plan of a comparison, no recipe; give it alone"
    ]


def test_every_problem_of_every_recipe_is_told_before_anything_runs(recipes, capsys):
    bad = yaml.safe_load(Path("recipes/a.yaml").read_text())
    bad["training"]["learning_rte"] = 1
    Path("recipes/a.yaml").write_text(yaml.safe_dump(bad))
    words = ["recipes/a.yaml", "recipes/b.yaml", "none.yaml", "method.r=4"]
    assert main(["compare", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    known = [line for line in lines if line.startswith("override 'method.r=4': method.r: unknown")]
    assert len(known) == 1
    at = Path("recipes/a.yaml").read_text().splitlines().index("  learning_rte: 1") + 1
    assert any(
        line.startswith(f"recipes/a.yaml:{at}: training.learning_rte: unknown key; did you mean")
        for line in lines
    )
    assert "none.yaml: cannot be read: No such file or directory" in lines
    assert len(lines) == 3
    assert not Path("comparison").exists()


def test_a_recipe_given_twice_and_two_of_one_name_are_refused(recipes):
    Path("recipes/c.yaml").write_text("name: b\n" + Path("recipes/a.yaml").read_text())
    os.symlink("a.yaml", "recipes/link.yaml")
    words = [f"recipes/{name}.yaml" for name in ("a", "b", "c", "link", "b")]
    assert problems(words) == [
        "recipes/link.yaml: given more than once; each recipe is run once a seed",
        "recipes/b.yaml: given more than once; each recipe is run once a seed",
        "recipes/c.yaml: name: 'b' is also that of recipes/b.yaml; give each its own, "
        "as runs are kept by name",
    ]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["seed=3"], "compare: overrides: 'seed' is said by seeds"),
        (["output_dir=x"], "compare: overrides: 'output_dir' is said by out"),
        (["name=x"], "compare: overrides: 'name' is said by the recipe itself"),
    ],
)
def test_an_override_of_what_the_comparison_sets_is_refused(recipes, words, line):
    assert problems(["recipes/a.yaml", *words]) == [line]


def test_overrides_alone_are_no_comparison(workplace):
    assert problems(["training.max_steps=3"]) == ["compare: recipes: name at least one recipe"]


def test_bad_numbers_on_the_command_line_are_told_together(recipes, capsys):
    words = ["--jobs", "0", "--price-per-hour", "nan", "--seeds", "1,1"]
    assert main(["compare", "recipes/a.yaml", *words]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "--jobs 0: jobs: must be greater than or equal to 1, found 0 (number)",
        "--price-per-hour nan: price_per_hour: must be a finite number, found NaN (number)",
        "--seeds 1,1: seeds: 1 named more than once",
    ]


def test_a_file_with_an_equals_sign_is_a_recipe(recipes):
    os.rename("recipes/a.yaml", "r=4.yaml")
    assert planned_runs(read_plan(["r=4.yaml"], {}))[0].recipe.name == "r_4"


def test_a_folder_of_any_name_reaches_the_run_as_it_is(recipes):
    for out in ("1e3", "a: b # c", 'qu"ote'):
        assert planned_runs(read_plan(["recipes/a.yaml"], {"out": out}))[0].folder == (
            Path(out) / "runs" / "a-seed0"
        )
