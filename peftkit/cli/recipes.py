"""The verbs about one recipe: `validate`, `show` and `schema`.

Called by `cli.app`; imports the recipe inside each verb and loads no model.
"""

from pathlib import Path
from typing import Annotated

import typer

from peftkit.cli.output import JsonFlag, print_json
from peftkit.errors import RecipeError

JSON_SCHEMA = "https://json-schema.org/draft/2020-12/schema"

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Keys to override.")
]


def add_to(app: typer.Typer) -> None:
    """Register the verbs."""
    app.command("validate", epilog="Example: peftkit validate recipes/*.yaml")(validate)
    app.command("show", epilog="Example: peftkit show recipes/lora_sst2.yaml method.r=16")(show)
    app.command("schema", epilog="Example: peftkit schema > recipe.schema.json")(schema)


def validate(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE", help="Recipe files.")],
    *,
    as_json: JsonFlag = False,
) -> None:
    """Check recipes.

    Lists every problem of all of them, and exits 2 if there is one.
    """
    found = {str(path): _problems(path) for path in recipes}
    if as_json:
        print_json([{"recipe": p, "valid": not bad, "problems": bad} for p, bad in found.items()])
    else:
        for path, bad in found.items():
            print(f"{path}: {_verdict(len(bad))}")
    if any(found.values()):
        raise RecipeError([problem for bad in found.values() for problem in bad])


def _verdict(problems: int) -> str:
    return f"{problems} problem{'s' * (problems > 1)}" if problems else "valid"


def _problems(path: Path) -> list[str]:
    from peftkit.recipe import load_recipe

    try:
        load_recipe(path, [])
    except RecipeError as error:
        return error.problems
    return []


def show(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file.")],
    overrides: Overrides = None,
    *,
    as_json: JsonFlag = False,
) -> None:
    """Print a recipe as it would run.

    Defaults are filled in and overrides applied.
    """
    from peftkit.recipe import load_recipe, resolved_yaml

    resolved = load_recipe(recipe, overrides or [])
    if as_json:
        print_json(resolved.resolved())
    else:
        print(resolved_yaml(resolved), end="")


def schema() -> None:
    """Print JSON Schema of recipes, for editors."""
    from peftkit.recipe import recipe_model

    content = recipe_model().model_json_schema()
    # The file's own name is the default, which the model cannot know.
    content["required"] = [key for key in content["required"] if key != "name"]
    print_json({"$schema": JSON_SCHEMA, **content})
