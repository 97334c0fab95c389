"""The verb `compare`: every recipe under every seed, each in processes of its own, then the report.

Called by `cli.app`; imports the plan, the runs and the report inside the verb.
"""

import shlex
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from peftkit.cli.output import note
from peftkit.errors import SIGNALLED, RunError

if TYPE_CHECKING:
    from peftkit.cli.comparison_plan import ComparisonPlan
    from peftkit.cli.comparison_rows import Row

EXAMPLES = (
    "Examples: peftkit compare recipes/*_sst2.yaml --seeds 3 training.max_steps=200; "
    "peftkit compare comparison.yaml"
)
PLAN_FILE = "comparison.yaml"
_WORDS = "peftkit.compare.words"


class CompareCommand(TyperCommand):
    """Keeps its words, for the command that goes on where a comparison was stopped."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As ever, but the words stay in `Context.meta`."""
        ctx.meta[_WORDS] = list(args)
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The words after `peftkit compare`."""
        return ["[OPTIONS]", "RECIPE...|PLAN", "[KEY=VALUE]..."]


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command("compare", cls=CompareCommand, epilog=EXAMPLES)(compare)


def compare(
    context: typer.Context,
    words: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE...|PLAN", help="Recipes, or a YAML plan; then KEY=VALUE."),
    ],
    *,
    seeds: Annotated[
        str | None, typer.Option(help="How many, or which: 3 or 0,5,7. Default: 3.")
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR", help="Default: comparison.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Runs side by side. Default: 1.")] = None,
    price_per_hour: Annotated[
        float | None, typer.Option("--price-per-hour", help="Of this machine.")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Repeat what failed in an earlier comparison.")
    ] = False,
) -> None:
    """Compare recipes.

    Runs each recipe under each seed and writes the report. KEY=VALUE overrides a key in all of
    them. Stopped and started again, it goes on where it was; what is done is not repeated. A run
    that fails becomes a row with its reason. Exits 1 if a run has failed, 130 after Ctrl-C and 143
    after SIGTERM.
    """
    from peftkit.cli.comparison_folders import locked, survey
    from peftkit.cli.comparison_plan import planned_runs, read_plan
    from peftkit.cli.comparison_rows import rows_of

    options = {"seeds": seeds, "out": out, "jobs": jobs, "price_per_hour": price_per_hour}
    plan = read_plan(words, options)
    runs = planned_runs(plan)
    _refuse_unusable_registry()
    with locked(Path(plan.out), runs) as lock:
        rows = rows_of(runs, survey(runs, retry_failed=retry_failed))
        _keep(plan)
        _tell_what_is_kept(rows)
        stopped_by = _carry_out(rows, plan, lock, debug=bool(context.obj))
        left = sum(row.state in ("waiting", "stopped") for row in rows)
        if left:
            command = shlex.join(["peftkit", "compare", *context.meta[_WORDS]])
            why = f"stopped by {stopped_by.name}" if stopped_by else "stopped from outside"
            note(f"{why}: {left} of {len(rows)} runs are left; go on with\n{command}")
            raise typer.Exit(_exit_code(stopped_by))
        write_report(plan)
    if failed := sum(row.state == "failed" for row in rows):
        note(f"{failed} of {len(rows)} runs failed")
        raise typer.Exit(1)


def _exit_code(stopped_by: signal.Signals | None) -> int:
    """That of a run that the same signal stopped; a lost terminal counts as SIGTERM."""
    if stopped_by is None:
        return 1
    return SIGNALLED + (signal.SIGINT if stopped_by == signal.SIGINT else signal.SIGTERM)


def _refuse_unusable_registry() -> None:
    """Every run would fail by it."""
    from peftkit.registry import default_root, root_problem

    if problem := root_problem(default_root()):
        raise RunError(f"registry {default_root()}: {problem}; name another in PEFTKIT_REGISTRY")


def _keep(plan: "ComparisonPlan") -> None:
    """Write the plan into its folder, for the report and for going on without the recipes' names.

    The number of jobs never falls there: what was measured side by side stays so.
    """
    from peftkit.cli.comparison_plan import stored_jobs, stored_text
    from peftkit.staging import write_file

    file = Path(plan.out) / PLAN_FILE
    text = stored_text(plan, jobs=max(plan.jobs, stored_jobs(file)))
    write_file(file, text.encode())


def _tell_what_is_kept(rows: "Sequence[Row]") -> None:
    done = sum(row.state == "done" for row in rows)
    failed = sum(row.state == "failed" for row in rows)
    if done:
        note(f"{done} of {len(rows)} runs are done already")
    if failed:
        note(f"{failed} of {len(rows)} runs failed before; --retry-failed repeats them")


def _carry_out(rows: "Sequence[Row]", plan: "ComparisonPlan", lock: int, *, debug: bool) -> Any:
    from peftkit.cli.comparison_progress import display
    from peftkit.cli.comparison_runs import Places, carry_out, environments, own_gpus

    if all(row.state != "waiting" for row in rows):
        return None
    if plan.jobs > 1 and not own_gpus(plan.jobs):
        note(
            f"note: {plan.jobs} runs at a time share this machine's processors and memory, so "
            "their seconds cannot be compared with those of runs on their own; the report says so"
        )
    places = Places(environments(plan.jobs), lock, debug)
    with display(rows, jobs=plan.jobs) as shown:
        return carry_out(rows, places, shown)


def write_report(plan: "ComparisonPlan") -> None:
    """Write the report of all runs in the plan's folder, print it in short, say where it is."""
    from peftkit.cli.report import print_comparison
    from peftkit.reporting.comparison import compare as compared
    from peftkit.reporting.comparison import write_comparison

    comparison = compared([Path(plan.out)], price_per_hour=plan.price_per_hour)
    for problem in comparison.problems:
        note(str(problem))
    paths = write_comparison(comparison, Path(plan.out))
    print_comparison(comparison)
    for path in paths:
        note(str(path))
