"""However a recipe is broken, what comes back is lines that name file, line and key."""

import re
import time
from pathlib import Path

import pytest
from recipe_mutations import MUTATIONS, mutants

from peftkit.errors import RecipeError, UsageError
from peftkit.recipe import load_recipe

SHIPPED = sorted((Path(__file__).parent.parent / "recipes").rglob("*.yaml"))
RICH = """\
# Every kind of value.
name: rich
base:
  name: somewhere/base
  revision: main
task:
  type: classification
  dataset: somewhere/data
  text_columns: [first, second]
  labels:
    - "no"
    - "yes"
  metrics: [accuracy, f1]
  holdout_fraction: 0.05
method:
  type: lora
  r: 8
  lora_dropout: 0.1
  target_modules: [query, value]
  rank_pattern: {query: 4}
  use_rslora: true
training:
  learning_rate: 1e-4
  num_train_epochs: 3
  metric_for_best_model: accuracy
seed: 7
"""
SECONDS = 2.0


def problems_of(content, folder):
    """The lines of the error, or None if the recipe loads; nothing else may come of it."""
    path = folder / "x.yaml"
    path.write_bytes(content)
    started = time.process_time()
    try:
        load_recipe(path)
    except RecipeError as error:
        return error.problems
    finally:
        assert time.process_time() - started < SECONDS
    return None


def check(count, seed, folder):
    line = re.compile(rf"{re.escape(str(folder / 'x.yaml'))}(:[1-9][0-9]*)?: \S.*")
    refused = dict.fromkeys((mutation.__name__ for mutation in MUTATIONS), 0)
    texts = [RICH, *(path.read_text() for path in SHIPPED)]
    for name, (content, expected) in mutants(texts, count, seed):
        problems = problems_of(content, folder)
        if problems is None:
            assert expected is None, f"{name}: accepted"
            continue
        refused[name.split()[0]] += 1
        for problem in problems:
            assert line.fullmatch(problem), f"{name}: {problem!r}"
            assert problem.isprintable(), f"{name}: {problem!r}"
            assert len(problem) < 1500, f"{name}: {problem!r}"
        for part in (expected or "").split("|"):
            assert part in "\n".join(problems), f"{name}: {part!r} not in {problems}"
    return refused


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_recipe_loads(path):
    recipe = load_recipe(path)
    assert recipe.run_folder.name.startswith(recipe.name)


def test_the_recipe_that_is_mutated_is_accepted(tmp_path):
    assert SHIPPED
    assert problems_of(RICH.encode(), tmp_path) is None


def test_a_recipe_error_ends_the_process_with_2():
    assert issubclass(RecipeError, UsageError)
    assert RecipeError("x").exit_code == 2


def test_a_hundred_broken_recipes_give_clear_lines_quickly(tmp_path):
    refused = check(100, 0, tmp_path)
    # A mutation may happen to be harmless; a kind that is never refused tests nothing.
    assert min(refused.values()) >= 2, refused


@pytest.mark.slow
def test_five_thousand_broken_recipes_give_clear_lines_quickly(tmp_path):
    refused = check(5000, 1, tmp_path)
    assert sum(refused.values()) > 4000, refused
