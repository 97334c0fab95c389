"""Which arms the data cannot tell apart, as letters: two arms that share one are not separated.

Called by the comparison. Not being separated is not transitive, so the groups overlap.
"""

from collections.abc import Iterable
from string import ascii_lowercase
from typing import Final

MAX_ARMS: Final = 40
"""Above it the number of overlapping groups may explode and no one could read them."""

Group = frozenset[int]


def letters(order: list[int], separated: Iterable[tuple[int, int]]) -> dict[int, str]:
    """Letters of each arm, `a` for the group of the best; `order` lists the arms from the best.

    For at most `MAX_ARMS` arms.

    Source: Piepho 2004, "An algorithm for a letter-based representation of all-pairwise
    comparisons", Journal of Computational and Graphical Statistics 13(2): insert and absorb.
    """
    groups = {frozenset(order)}
    for pair in separated:
        groups = _absorbed(_split(groups, *pair))
    place = {arm: number for number, arm in enumerate(order)}
    ranked = sorted(groups, key=lambda group: sorted(place[arm] for arm in group))
    return {
        arm: "".join(_letter(n) for n, group in enumerate(ranked) if arm in group) for arm in order
    }


def _split(groups: set[Group], one: int, other: int) -> set[Group]:
    """No group holds both any more."""
    found: set[Group] = set()
    for group in groups:
        found |= {group - {one}, group - {other}} if {one, other} <= group else {group}
    return found


def _absorbed(groups: set[Group]) -> set[Group]:
    """Without the groups that lie within another."""
    return {group for group in groups if not any(group < other for other in groups)}


def _letter(number: int) -> str:
    rounds, place = divmod(number, 26)
    return ascii_lowercase[place] + (str(rounds) if rounds else "")
