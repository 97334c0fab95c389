"""Rows of two splits to train, held-out and validation parts that share no text, tokenised.

Called by the tasks; imports `data.splits` and, from this room, `encoding`.
"""

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peftkit.contracts import Split
from peftkit.data.holdout import hold_out
from peftkit.data.splits import Key, Row, remove_overlap, rows_digest
from peftkit.errors import DataError
from peftkit.tasks.columns import TextRow
from peftkit.tasks.encoding import tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def separate(
    train: list[dict[str, Any]],
    validation: list[dict[str, Any]],
    *,
    max_train: int | None,
    holdout_fraction: float,
    seed: int,
    key: Key | None = None,
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, int]]:
    """Parts by name (`holdout` only if one is held out), and counts of what was done.

    No two parts hold rows of the same normalised texts, or of what `key` takes of a row.
    Validation keeps every row; train loses those that validation holds, then all but `max_train`
    rows, then the held-out ones. Every part keeps the order of its source.

    Raises:
        DataError: nothing is left to train on, or the fraction empties one side.
    """
    unseen, removed = remove_overlap(train, validation, key or _texts)
    if not unseen:
        raise DataError(
            f"each of the {removed} training rows {'asks what' if key else 'is'} a validation row "
            f"{'asks' if key else 'too'}; nothing is left to train on, check the splits"
        )
    used = [dict(unseen[index]) for index in _chosen(len(unseen), max_train, seed)]
    kept, held = hold_out(used, holdout_fraction, seed, key=key or _texts)
    parts = {"train": [used[index] for index in kept], "validation": validation}
    if held:
        parts["holdout"] = [used[index] for index in held]
    counts = {
        "removed_from_train": removed,
        "left_out_of_train": len(unseen) - len(used),
        "empty_texts": sum(not all(map(str.strip, row["texts"])) for row in used + validation),
    }
    return parts, counts


def tokenise_parts(
    tokenizer: "PreTrainedTokenizerBase",
    parts: Mapping[str, list[TextRow]],
    *,
    max_length: int,
) -> tuple[dict[str, Split], int]:
    """The parts as tokenised, labelled splits, and how many examples were cut to `max_length`.

    Raises:
        DataError: every example of a part is longer than `max_length`.
    """
    ready: dict[str, Split] = {}
    problems, total = [], 0
    for name, rows in parts.items():
        encoded, cut = tokenise(tokenizer, [row["texts"] for row in rows], max_length=max_length)
        both = zip(encoded, rows, strict=True)
        tokens = [
            {**new, "label": row["label"], "source_row": row["source_row"]} for new, row in both
        ]
        content = ({"texts": row["texts"], "label": row["label"]} for row in rows)
        ready[name] = Split(name, tokens, rows_digest(content))
        total += cut
        if cut == len(rows):
            problems.append(
                f"{name}: each of the {cut} examples is longer than max_length {max_length}; "
                "raise it or shorten the texts"
            )
    if problems:
        raise DataError(problems)
    return ready, total


def _chosen(count: int, limit: int | None, seed: int) -> list[int]:
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), limit))


def _texts(row: Row) -> list[str]:
    return list(row["texts"])
