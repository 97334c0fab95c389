"""The verb `plan`: peak memory of recipes before anything of them is loaded.

Called by `cli.app`; imports the planning inside the verb.
"""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from peftkit.cli.output import JsonFlag, note, print_json, print_table
from peftkit.errors import UsageError
from peftkit.importing import undisturbed_imports

if TYPE_CHECKING:
    from peftkit.planning.answers import Answers, Choice
    from peftkit.planning.budget import Budget
    from peftkit.planning.predict import Prediction
    from peftkit.planning.setting import Setting
    from peftkit.recipe import Recipe

PRECISIONS = ("no", "bf16", "fp16")
SHARDINGS = ("ddp", "zero2", "zero3", "fsdp")


class Plan(NamedTuple):
    """One recipe, what it needs, and the answers if there is a budget."""

    name: str
    setting: "Setting"
    found: "Prediction"
    said: "Answers | None"


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    example = "Example: peftkit plan recipes/lora_sst2.yaml --gpu l4"
    app.command("plan", epilog=example)(plan)


def plan(
    words: Annotated[
        list[str], typer.Argument(metavar="RECIPE... [KEY=VALUE]...", help="Recipes, overrides.")
    ],
    *,
    budget: Annotated[str | None, typer.Option(help="Memory there is, such as 24GiB.")] = None,
    gpu: Annotated[str | None, typer.Option(help="A GPU by name, such as l4 or h100.")] = None,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an example; default: task.max_length.")
    ] = None,
    mixed_precision: Annotated[
        str | None, typer.Option(help="no, bf16 or fp16; default: the recipe's, bf16 on a GPU.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes that train together.")] = 1,
    sharding: Annotated[str, typer.Option(help="ddp, zero2, zero3 or fsdp.")] = "ddp",
    as_json: JsonFlag = False,
) -> None:
    """Predict peak memory.

    Nothing is loaded but the base's config. Says what each phase needs and, with --budget or --gpu,
    whether it fits, the largest batch, which methods would fit, and what would make it fit.
    """
    available = _budget(budget, gpu)
    _check("--mixed-precision", mixed_precision, PRECISIONS)
    _check("--sharding", sharding, SHARDINGS)
    recipes = _recipes(words)
    if sharding != "ddp" and processes == 1:
        note(
            f"--sharding {sharding} shares nothing out over one process; add --processes 2 or more"
        )
    with undisturbed_imports():
        from peftkit.modeling.libraries import import_peft
        from peftkit.planning.answers import answers

        import_peft()

    settings = [_setting(r, length, mixed_precision, on_gpu=gpu is not None) for r in recipes]
    plans = []
    for name, setting in zip((recipe.name for recipe in recipes), settings, strict=True):
        ask = _asking(processes, sharding)
        found = ask(setting)
        said = answers(name, setting, available, ask=ask) if available else None
        plans.append(Plan(name, setting, found, said))
        if not as_json:
            _print(plans[-1])
    if as_json:
        print_json([_as_json(plan) for plan in plans])
    elif len(plans) > 1:
        print(_sentence_of_all(plans))


def _asking(processes: int, sharding: Any) -> "Callable[[Setting], Prediction]":
    """Predicts for one of the processes, and each setting once."""
    from peftkit.planning.predict import predict
    from peftkit.planning.sharding import sharded

    known: list[tuple[Setting, Prediction]] = []

    def ask(setting: "Setting") -> "Prediction":
        found = next((found for other, found in known if other == setting), None)
        if found is None:
            found = sharded(predict(setting), sharding, processes)
            known.append((setting, found))
        return found

    return ask


def _budget(budget: str | None, gpu: str | None) -> "Budget | None":
    from peftkit.planning.budget import Budget, gib, gpu_budget, parse_size

    if gpu is None:
        return None if budget is None else Budget("budget", parse_size(budget))
    known = gpu_budget(gpu)
    if budget is None:
        return known
    size = parse_size(budget)
    if size > known.total_bytes:
        has = gib(known.total_bytes)
        raise UsageError(f"--budget {budget!r}: more than the {has} that {known.name} has")
    return Budget(f"of {known.name}", size, on_gpu=True)


def _check(option: str, value: str | None, allowed: tuple[str, ...]) -> None:
    if value is not None and value not in allowed:
        raise UsageError(f"{option} {value!r}: expected one of {', '.join(allowed)}")


def _recipes(words: list[str]) -> "list[Recipe]":
    from peftkit.errors import RecipeError
    from peftkit.recipe import load_recipe

    overrides = [word for word in words if "=" in word]
    paths = [Path(word) for word in words if "=" not in word]
    if not paths:
        raise UsageError("plan: name at least one recipe")
    recipes, problems = [], []
    for path in paths:
        try:
            recipes.append(load_recipe(path, overrides))
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    return recipes


def _setting(
    recipe: "Recipe", length: int | None, mixed_precision: str | None, *, on_gpu: bool
) -> "Setting":
    from peftkit.planning.setting import of_recipe

    own = recipe.training.mixed_precision or ("bf16" if on_gpu else "no")
    precision = mixed_precision or own
    return of_recipe(recipe, length=length, mixed_precision=precision, on_gpu=on_gpu)


def _as_json(plan: Plan) -> dict[str, Any]:
    from dataclasses import asdict

    from peftkit.planning.sentences import sentence

    name, setting, found, said = plan
    shape = {"batch": setting.train.examples, "tokens": setting.train.tokens}
    result: dict[str, Any] = {
        "recipe": name,
        "method": setting.method_type,
        **shape,
        "mixed_precision": setting.spec.mixed_precision,
        "peak_bytes": found.peak.total_bytes,
        "phases": {phase: asdict(peak) for phase, peak in found.phases.items()},
    }
    if said:
        best = said.recommended
        more = {"advice": best.advice if best else None, "sentence": sentence(said)}
        result |= {"answers": {**asdict(said), **more}}
    return result


def _planned_for(setting: "Setting") -> str:
    precision = setting.spec.mixed_precision
    kind = "float32" if precision == "no" else f"mixed precision {precision}"
    if setting.on_gpu:
        return f"as on a GPU in {kind}"
    return f"as on a CPU in {kind}; --gpu NAME plans for a GPU"


def _print(plan: Plan) -> None:
    from peftkit.planning.budget import gib
    from peftkit.planning.sentences import sentence_without_budget

    name, setting, found, said = plan
    size = f"batch {setting.train.examples} x {setting.train.tokens} tokens"
    print(f"{name}: {setting.method_type}, {size}, {_planned_for(setting)}")
    kinds = list(dict.fromkeys(kind for peak in found.phases.values() for kind in peak.by_kind))
    rows = [
        [phase.replace("_", " "), gib(peak.total_bytes)]
        + [gib(held) if (held := peak.by_kind.get(kind, 0)) else "-" for kind in kinds]
        for phase, peak in found.phases.items()
    ]
    print_table(("phase", "peak", *(kind.replace("_", " ") for kind in kinds)), rows)
    if said:
        _print_answers(said)
    else:
        note("add --budget 24GiB or --gpu l4 to hear what fits")
        print(sentence_without_budget(setting, found))


def _print_answers(said: "Answers") -> None:
    from peftkit.planning.fitting import MAX_BATCH
    from peftkit.planning.sentences import sentence

    columns = ("the best score to be expected first", "peak", said.budget.name, "to be added")
    print_table(columns, [_row(choice) for choice in said.methods])
    largest = "at least " * (said.largest_batch >= MAX_BATCH) + str(said.largest_batch)
    print(f"largest batch at this length: {largest}")
    best = said.recommended
    if best and best.advice:
        print(f"add: {shlex.join(best.advice)}")
    if best and best.overrides:
        note("another method wants another training.learning_rate; try several")
    print(sentence(said))


def _row(choice: "Choice") -> list[str]:
    from peftkit.planning.budget import gib

    if choice.peak_bytes is None:
        return [choice.label, "-", "not possible", choice.reason or "-"]
    peak = gib(choice.peak_bytes)
    if choice.fits:
        return [choice.label, peak, "fits", shlex.join(choice.advice) or "-"]
    if choice.change:
        changed = f"fits changed, {gib(choice.change.peak_bytes)}"
        return [choice.label, peak, changed, shlex.join(choice.advice)]
    return [choice.label, peak, "too large", f"needs at least {gib(choice.least_bytes or 0)}"]


def _sentence_of_all(plans: list[Plan]) -> str:
    from peftkit.planning.sentences import sentence_of_all, sentence_of_all_without_budget

    said = [plan.said for plan in plans if plan.said]
    if said:
        return sentence_of_all(said)
    names, settings, found, _ = zip(*plans, strict=True)
    return sentence_of_all_without_budget(names, settings, found)
