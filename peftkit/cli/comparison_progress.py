"""What a person sees of a comparison: a live table on a terminal, plain lines elsewhere, on stderr.

Called by the verb `compare` and by `comparison_runs`; rich is imported only for a terminal.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from peftkit.cli.comparison_rows import Row, duration, left_words, run_seconds_left, tally

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

SECONDS_BETWEEN_DRAWINGS = 0.5
_COLOURS = {"running": "cyan", "done": "green", "failed": "red", "stopped": "yellow"}
_OTHER_LINES = 7
"""Of a terminal: the table's head, the lines under it, and the shell's."""


class Display(Protocol):
    """Tells a person how the runs go."""

    def began(self, row: Row) -> None:
        """A run was started."""

    def ended(self, row: Row) -> None:
        """A run is over."""

    def draw(self) -> None:
        """Time has passed."""

    def say(self, line: str) -> None:
        """Something about the comparison as a whole."""


@contextmanager
def display(rows: Sequence[Row], *, jobs: int) -> Iterator[Display]:
    """The display that suits where stderr goes."""
    if not sys.stderr.isatty():
        yield Lines(rows, jobs=jobs)
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), auto_refresh=False) as live:
        table = LiveTable(rows, jobs=jobs, live=live)
        try:
            yield table
        finally:
            table.draw_now()


class Lines:
    """A line when a run begins and one when it ends."""

    def __init__(self, rows: Sequence[Row], *, jobs: int) -> None:
        self._rows, self._jobs = rows, jobs

    def began(self, row: Row) -> None:
        """Which one, and where it goes on."""
        after = f" again, after step {row.first_step}" if row.first_step else ""
        self.say(f"{self._name(row)}: started{after}")

    def ended(self, row: Row) -> None:
        """How, how long it took, and the time that is left."""
        what = f"{row.state}: {row.detail}" if row.detail else row.state
        took = "" if row.seconds is None else f" ({duration(row.seconds)})"
        left = left_words(self._rows, jobs=self._jobs, now=time.time())
        self.say(f"{self._name(row)}: {what}{took}; {left}")

    def draw(self) -> None:
        """Nothing: a pipe gets each thing once."""

    def say(self, line: str) -> None:
        """At once, as others may be reading."""
        print(line, file=sys.stderr, flush=True)

    def _name(self, row: Row) -> str:
        return f"[{self._rows.index(row) + 1}/{len(self._rows)}] {row.run.label}"


class LiveTable:
    """All runs, drawn again and again in one place."""

    def __init__(self, rows: Sequence[Row], *, jobs: int, live: "Live") -> None:
        self._rows, self._jobs, self._live = rows, jobs, live
        self._drawn = 0.0
        self._said = ""

    def began(self, row: Row) -> None:
        """Shown at once."""
        self.draw_now()

    def ended(self, row: Row) -> None:
        """Shown at once."""
        self.draw_now()

    def draw(self) -> None:
        """At most every half second."""
        if time.monotonic() - self._drawn >= SECONDS_BETWEEN_DRAWINGS:
            self.draw_now()

    def say(self, line: str) -> None:
        """Under the table, until something else is said."""
        self._said = line
        self.draw_now()

    def draw_now(self) -> None:
        """Replace what is shown."""
        self._drawn = time.monotonic()
        self._live.update(self._drawing(), refresh=True)

    def _drawing(self) -> "RenderableType":
        from rich.console import Group
        from rich.text import Text

        now = time.time()
        # What is said is that the comparison ends early, so no time is foretold then.
        then = self._said or left_words(self._rows, jobs=self._jobs, now=now)
        colour = "yellow" if self._said else ""
        foot = [Text(tally(self._rows), style="bold"), Text(then, style=colour)]
        return Group(self._table(now), *foot)

    def _table(self, now: float) -> "RenderableType":
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, expand=True)
        table.add_column("recipe", no_wrap=True, overflow="ellipsis", ratio=2)
        table.add_column("seed", justify="right", no_wrap=True)
        table.add_column("state", no_wrap=True)
        table.add_column("", no_wrap=True, overflow="ellipsis", ratio=3)
        table.add_column("elapsed", justify="right", no_wrap=True)
        table.add_column("left", justify="right", no_wrap=True)
        for row in visible(self._rows, self._live.console.height - _OTHER_LINES):
            state = Text(row.state, style=_COLOURS.get(row.state, "dim"))
            times = [row.elapsed(now), run_seconds_left(row, self._rows, now)]
            cells = [Text(row.run.recipe.name), Text(str(row.run.recipe.seed)), state]
            table.add_row(*cells, Text(_detail(row)), *map(duration, times))
        return table


def visible(rows: Sequence[Row], height: int) -> Sequence[Row]:
    """As many rows as there are lines for, from a little before the first that is not over."""
    room = max(3, height)
    if len(rows) <= room:
        return rows
    open_ = [n for n, row in enumerate(rows) if row.state in ("running", "waiting")]
    first = min(max(0, (open_[0] if open_ else len(rows)) - 2), len(rows) - room)
    return rows[first : first + room]


def _detail(row: Row) -> str:
    if row.state != "running":
        return row.detail
    return f"step {row.step}/{row.total_steps}" if row.total_steps else "starting"
