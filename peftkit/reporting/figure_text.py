"""How numbers of the comparison are written for people.

Called by the tables, the charts and the summary; imports nothing.
"""

import math
from typing import Final

MIB: Final = 2**20
NONE: Final = "–"
"""Stands where there is no figure."""


def score(value: float | None) -> str:
    """A metric, four digits after the point."""
    return NONE if value is None or math.isnan(value) else f"{value:.4f}".replace("-", "−")


def signed(value: float) -> str:
    """A difference of scores."""
    return f"{value:+.4f}".replace("-", "−")


def interval(bounds: tuple[float, float] | None) -> str:
    """`0.871 to 0.911`."""
    if bounds is None:
        return NONE
    return " to ".join(f"{bound:.3f}".replace("-", "−") for bound in bounds)


def probability(value: float) -> str:
    """A p value; below a thousandth the digits carry no meaning."""
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def mib(size_bytes: float | None) -> str:
    """A size in MiB, without the unit: three digits that count."""
    if size_bytes is None:
        return NONE
    size = size_bytes / MIB
    digits = 0 if size >= 100 else 1 if size >= 10 else 2
    return f"{size:,.{digits}f}"


def number(value: float | None, digits: int = 0) -> str:
    """With thousands set apart."""
    return NONE if value is None else f"{value:,.{digits}f}"


def millions(count: int | None) -> str:
    """Of parameters: three digits that count."""
    if count is None:
        return NONE
    size = count / 1e6
    return f"{size:,.{0 if size >= 100 else 1 if size >= 10 else 3}f}"


def percent(value: float | None) -> str:
    """A ratio less 1, as `+3.1`."""
    return NONE if value is None else f"{100 * value:+.1f}".replace("-", "−")


def listed(names: list[str], most: int = 6) -> str:
    """`a, b and c`; of a long list the first and how many more."""
    if len(names) > most:
        return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} more"
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def plural(count: int, word: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def words(name: str) -> str:
    """A metric's name for reading."""
    return name.replace("_", " ")
