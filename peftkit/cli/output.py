"""How verbs print results: JSON, or a table that is drawn on a terminal and plain in a pipe.

Called by every verb that reads; rich is imported only for a terminal. Results go to stdout.
"""

import json
import sys
from collections.abc import Collection, Sequence
from typing import Annotated, Any, Literal

import typer

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]

STATE_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red", "broken": "red"}


def print_json(data: Any) -> None:
    """One JSON document on stdout: indented, a list with one line an item."""
    if isinstance(data, list):
        # Indenting ten thousand items would take several times as long.
        encoder = json.JSONEncoder(ensure_ascii=False, default=str)
        items = ",\n".join(map(encoder.encode, data))
        print(f"[\n{items}\n]" if items else "[]")
    else:
        print(json.dumps(data, indent=2, ensure_ascii=False, default=str))


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Collection[int] = ()
) -> None:
    """Rows under their column names; a pipe gets aligned text, uncut and without colour.

    `numbers` are the places of columns that are set to the right.
    """
    if sys.stdout.isatty():
        _print_drawn(columns, rows, numbers)
    else:
        print("\n".join(_aligned([columns, *rows], numbers)))


def print_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    """`name  value` lines, aligned."""
    print("\n".join(_aligned(pairs)))


def note(line: str) -> None:
    """Tell the reader something that is not a result."""
    print(line, file=sys.stderr)


def _aligned(rows: Sequence[Sequence[str]], numbers: Collection[int] = ()) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [">" if place in numbers else "<" for place in range(len(widths))]
    return [
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def _print_drawn(
    columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[int]
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for number, column in enumerate(columns):
        justify: Literal["right", "left"] = "right" if number in numbers else "left"
        table.add_column(column, overflow="fold", no_wrap=number == 0, justify=justify)
    for row in rows:
        table.add_row(*(Text(cell, style=STATE_COLOURS.get(cell, "")) for cell in row))
    Console().print(table)


def megabytes(size_bytes: int) -> str:
    """A size for people, in units of 10^6 bytes; small ones in units of 10^3."""
    if size_bytes < 1_000_000:
        return f"{size_bytes / 1e3:.1f} kB"
    return f"{size_bytes / 1e6:,.1f} MB"
