"""The verb `merge`: one stored delta into its base, or several into a new one.

Called by `cli.app`; imports torch and the merging inside the verb.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from peftkit.cli.output import JsonFlag, note, print_json, print_pairs, print_table
from peftkit.errors import UsageError

if TYPE_CHECKING:
    from peftkit.merging.into_base import Merged

EXAMPLES = (
    "Examples: peftkit merge lora_sst2 -o merged/; "
    "peftkit merge a b c --save-as abc --weights 0.5 0.3 0.2; peftkit merge plan.yaml"
)
_PLAN_SUFFIXES = (".yaml", ".yml")
_INTO_BASE = ("target", "dtype", "max_kl")
_COMBINING = ("combine", "weights", "density", "rank", "seed", "head_from", "evaluate")


class MergeCommand(TyperCommand):
    """Takes several numbers after one `--weights`, as in `--weights 0.5 0.3`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give each weight an option word of its own."""
        return super().parse_args(ctx, with_repeated_weights(args))


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command("merge", cls=MergeCommand, epilog=EXAMPLES)(merge)


def merge(
    context: typer.Context,
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...|PLAN", help="name or name@v2, or a YAML plan.")
    ],
    *,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="New model folder.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="After QLoRA: dequantised (default), original or quantised base."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: as the base.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option("--max-kl", help="Fail if the drift in nats is above this.")
    ] = None,
    save_as: Annotated[
        str | None, typer.Option("--save-as", metavar="NAME", help="Name of the new delta.")
    ] = None,
    combine: Annotated[
        str | None, typer.Option(help="cat, svd, linear, ties, dare_ties, … See docs/combining.md.")
    ] = None,
    weights: Annotated[
        list[float] | None, typer.Option(help="One number a delta; default: equal ones.")
    ] = None,
    density: Annotated[float | None, typer.Option(help="Share that pruning keeps.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of an svd's result.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of what DARE drops; default 0.")] = None,
    head_from: Annotated[
        str | None, typer.Option("--head-from", metavar="NAME", help="Whose head to take.")
    ] = None,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Score the new delta on each parent's task.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Merge deltas.

    With -o, folds one delta into its base and writes a model that plain transformers opens. With
    --save-as, or a plan, combines several deltas into a new one. Every result is read back and
    compared with what it was made of; one that answers differently is not kept.
    """
    given = context.params
    if output is not None:
        _refuse(given, ("save_as", *_COMBINING), "belongs to --save-as, not to -o")
        _into_base(names, output, {key: given[key] for key in _INTO_BASE}, as_json=as_json)
        return
    _refuse(given, _INTO_BASE, "belongs to -o, not to --save-as")
    _combine(_plan(names, given), evaluate=evaluate, as_json=as_json)


def with_repeated_weights(arguments: Sequence[str]) -> list[str]:
    """`--weights 1 2` as `--weights 1 --weights 2`."""
    found: list[str] = []
    after = False
    for word in arguments:
        if after and _is_number(word):
            if found[-1] != "--weights":
                found.append("--weights")
            found.append(word)
        else:
            after = word == "--weights"
            found.append(word)
    return found


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _refuse(given: dict[str, Any], keys: Sequence[str], why: str) -> None:
    used = [key for key in keys if given[key] not in (None, [], ()) and given[key] is not False]
    problems = [f"--{key.replace('_', '-')}: {why}" for key in used]
    if problems:
        raise UsageError(problems)


def _into_base(
    names: Sequence[str], output: Path, options: dict[str, Any], *, as_json: bool
) -> None:
    if len(names) != 1:
        raise UsageError(
            f"merge: -o takes one delta, {len(names)} given; combine them first by --save-as"
        )
    from peftkit.merging.into_base import MergeOptions, described, merge_into_base
    from peftkit.registry import Registry, default_root

    merged = merge_into_base(Registry(default_root()), names[0], output, MergeOptions(**options))
    if as_json:
        print_json({"folder": str(output), **described(merged)})
    else:
        print_pairs(_pairs(merged))


def _pairs(merged: "Merged") -> list[tuple[str, str]]:
    from peftkit.merging.verification import described

    pairs = [("written", f"{merged.folder}, from {merged.stored}")]
    pairs.append(("verified", f"{described(merged.verification)} against the trained model"))
    for target, drift in merged.drift.items():
        chosen = " (written)" if target == merged.target else ""
        pairs.append((f"{target}{chosen}", described(drift)))
    return pairs


def _plan(names: Sequence[str], given: dict[str, Any]) -> Any:
    from peftkit.merging.plan import load_plan, plan_from

    if len(names) == 1 and names[0].endswith(_PLAN_SUFFIXES):
        _refuse(given, ("save_as", *_COMBINING[:-1]), "is said in the plan")
        return load_plan(Path(names[0]))
    if given["save_as"] is None:
        raise UsageError("merge: give -o DIR to fold into the base, or --save-as NAME to combine")
    keys = ("save_as", *_COMBINING)
    options = {key: given[key] for key in keys if key not in ("weights", "evaluate")}
    return plan_from(names, given["weights"] or [], options)


def _combine(plan: Any, *, evaluate: bool, as_json: bool) -> None:
    from peftkit.merging.combining import combine
    from peftkit.registry import Registry, default_root
    from peftkit.scoring import parent_scores

    registry = Registry(default_root())
    combined = combine(registry, plan)
    scores = parent_scores(registry, str(combined.stored)) if evaluate else []
    if as_json:
        rows = [vars(score) for score in scores]
        print_json({**combined.plain(), **({"scores": rows} if evaluate else {})})
        return
    print_pairs(combined.pairs())
    if evaluate:
        note("each parent's task: what its run recorded, and what the new delta has")
        shown = [[s.parent, s.metric, _shown(s.recorded), _shown(s.result)] for s in scores]
        print_table(["parent", "metric", "recorded", "now"], shown)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}"
