"""Which rows of train are held out, so that nothing of them is left in train.

Called by the tasks; imports only `data.splits` and `errors`.
"""

import random
from collections.abc import Iterable, Sequence

from peftkit.data.splits import Key, Row, row_identity
from peftkit.errors import DataError

Words = tuple[str, ...]
Rows = list[int]

_KEY_WORDS = 3
"""First words of a text by which it is looked up inside longer ones."""


def hold_out(
    rows: Iterable[Row], fraction: float, seed: int, *, key: Key | None = None
) -> tuple[Rows, Rows]:
    """Indices that stay in train and indices that are held out, each ascending.

    No held-out text is a training text, nor lies word for word within one: the training split of
    SST-2, say, holds each sentence together with its phrases. So the held-out part can be a little
    smaller than `fraction` of the rows, never larger (but for what any part needs). Pairs of texts
    are compared as wholes only.

    Args:
        rows: the rows of train, cleaned.
        fraction: of the rows, from 0 (hold nothing out) to below 1.
        seed: of the permutation; equal seeds give equal parts.
        key: the text of a row; None takes all its string columns.

    Raises:
        DataError: the fraction is out of range, or would leave one side empty.
    """
    if not 0 <= fraction < 1:
        raise DataError(f"holdout fraction: {fraction} is not in the range 0 <= fraction < 1")
    copies: dict[tuple[str, ...], Rows] = {}
    for index, row in enumerate(rows):
        copies.setdefault(row_identity(row, key), []).append(index)
    groups = list(copies.values())
    count = sum(map(len, groups))
    wanted = max(1, round(count * fraction)) if fraction else 0
    held = _drawn(groups, _members(list(copies)), wanted, seed) if wanted else []
    if wanted and (not held or len(held) == count):
        raise DataError(
            f"holdout fraction: {fraction} of {count} rows ({len(groups)} different texts) leaves "
            "one side empty; use another fraction or more rows"
        )
    return sorted(set(range(count)) - set(held)), sorted(held)


def _drawn(groups: Sequence[Rows], members: list[list[int]], wanted: int, seed: int) -> Rows:
    """Rows of whole families, drawn until there are `wanted`; `members` are places in `groups`.

    A text that lies within several others is held once the last of them is.
    """
    outside = [0] * len(groups)
    for family in members:
        for text in family:
            outside[text] += 1
    random.Random(seed).shuffle(members)
    held: Rows = []
    for family in members:
        freed = [row for text in family if outside[text] == 1 for row in groups[text]]
        if len(held) + len(freed) <= wanted:
            held += freed
            for text in family:
                outside[text] -= 1
    return held


def _members(identities: Sequence[tuple[str, ...]]) -> list[list[int]]:
    """For each text that lies in no other: its own place and those of all texts within it."""
    words = [tuple(texts[0].split()) if len(texts) == 1 else () for texts in identities]
    places = {text: place for place, text in enumerate(words) if text}
    lengths: dict[Words, set[int]] = {}
    for text in places:
        lengths.setdefault(text[:_KEY_WORDS], set()).add(len(text))
    families: dict[int, list[int]] = {}
    inside: set[int] = set()
    # Longest first: what lies within a text that lies within another is found there.
    for place in sorted(range(len(words)), key=lambda place: -len(words[place])):
        if place not in inside:
            within = {places[part] for part in _parts(words[place], lengths) if part in places}
            inside |= within
            families[place] = [place, *sorted(within - {place})]
    return [families[place] for place in sorted(families)]


def _parts(text: Words, lengths: dict[Words, set[int]]) -> Iterable[Words]:
    """Runs of words of `text` that may be texts of their own."""
    for start in range(len(text)):
        for size in range(1, _KEY_WORDS + 1):
            for length in lengths.get(text[start : start + size], ()):
                yield text[start : start + length]
