"""The verbs `ls` and `cp`: the recipes that come with peftkit.

Called by `cli.app`. They lie in the wheel as `peftkit/_recipes`, in a checkout as `recipes/`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

import peftkit
from peftkit.cli.output import JsonFlag, note, print_json, print_table
from peftkit.errors import UsageError, suggestion
from peftkit.staging import write_file


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe file; `name` is its path below the folder, without the ending."""

    name: str
    description: str
    path: Path


def add_to(app: typer.Typer) -> None:
    """Register the verbs."""
    app.command("ls", epilog="Example: peftkit ls")(list_recipes)
    app.command("cp", epilog="Example: peftkit cp lora_sst2 my_lora.yaml")(copy_recipe)


def recipes_folder() -> Path:
    """Where the shipped recipes lie."""
    package = Path(peftkit.__file__).resolve().parent
    packaged = package / "_recipes"
    return packaged if packaged.is_dir() else package.parent / "recipes"


def shipped_recipes() -> list[ShippedRecipe]:
    """All of them, by name."""
    folder = recipes_folder()
    return [
        ShippedRecipe(
            path.relative_to(folder).with_suffix("").as_posix(), _first_comment(path), path
        )
        for path in sorted(folder.rglob("*.yaml"))
    ]


def _first_comment(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = (line.lstrip("# ").strip() for line in lines if line.startswith("#"))
    return next((comment for comment in comments if comment), "")


def list_recipes(*, as_json: JsonFlag = False) -> None:
    """List the recipes that come with peftkit."""
    recipes = shipped_recipes()
    if as_json:
        fields = ("name", "description", "path")
        print_json([{field: str(getattr(r, field)) for field in fields} for r in recipes])
    elif recipes:
        print_table(["recipe", "description"], [[r.name, r.description] for r in recipes])
    else:
        note(f"no recipes in {recipes_folder()}")


def copy_recipe(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name from `peftkit ls`.")],
    destination: Annotated[
        str | None, typer.Argument(metavar="DEST", help="A file or a folder; by default here.")
    ] = None,
) -> None:
    """Copy a shipped recipe, to change it."""
    known = {recipe.name: recipe.path for recipe in shipped_recipes()}
    name = name.removesuffix(".yaml")
    if name not in known:
        raise UsageError(f"recipe '{name}' is unknown; {suggestion(name, known)}")
    target = Path(destination or ".")
    if target.is_dir():
        target /= known[name].name
    elif (destination or "").endswith("/"):
        raise UsageError(f"{target}: no such folder; create it or name a file")
    if target.exists():
        raise UsageError(f"{target}: exists already; name another file or remove it")
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent}: no such folder; create it or name another")
    write_file(target, known[name].read_bytes())
    print(target)
