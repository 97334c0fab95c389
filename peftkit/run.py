"""Accelerate's entry: `accelerate launch peftkit/run.py RECIPE [key=value ...]`."""

import argparse
import os
import sys
from pathlib import Path


def parse(argv: list[str]) -> argparse.Namespace:
    """Recipe, overrides and flags, in any order."""
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    flags = parser.add_mutually_exclusive_group()
    for word in ("overwrite", "resume", "resume-weights-only"):
        flags.add_argument(f"--{word}", dest="on_exists", action="store_const", const=word)
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return parser.parse_intermixed_args(argv)


def run(argv: list[str]) -> int:
    """Run the recipe; 0 only if the run completed."""
    from peftkit import importing, recipe

    arguments = parse(argv)
    resolved = recipe.load_recipe(arguments.recipe, arguments.overrides)
    with importing.undisturbed_imports():  # slow: a bad recipe does not wait for it
        from peftkit.experiment import run_experiment
        from peftkit.reporting.summary import summary_lines
    record = run_experiment(resolved, on_exists=arguments.on_exists or "refuse")
    if os.environ.get("RANK", "0") == "0":
        print(*summary_lines(record), sep="\n")
    return 0 if record.status == "completed" else 1


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # our modules must shadow no library
    from peftkit.cli.launch import run_and_leave_exit_code

    sys.exit(run_and_leave_exit_code(run))
