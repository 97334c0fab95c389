"""Texts to rows of token ids, and rows to padded tensors.

Called by the tasks, for their splits and for new texts alike; imports only `contracts`.
Legend: B batch, T tokens of the batch's longest row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftkit.contracts import Row

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import BatchEncoding, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Padding:
    """What a tokeniser fills short rows with, and on which side."""

    token_id: int
    type_id: int
    side: str


def padding_of(tokenizer: "PreTrainedTokenizerBase") -> Padding:
    """The tokeniser's own padding. A tokeniser that has neither pad nor eos token is no good."""
    # Decoders often have no pad token. Their eos id serves: the mask hides it.
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Padding(pad, tokenizer.pad_token_type_id, tokenizer.padding_side)


def unfit_lengths(
    tokenizer: "PreTrainedTokenizerBase", max_length: int, *, pair: bool
) -> list[str]:
    """One line for each reason why this tokeniser cannot make rows of `max_length` tokens."""
    limit, added = tokenizer.model_max_length, tokenizer.num_special_tokens_to_add(pair=pair)
    problems = []
    if max_length > limit:
        problems.append(f"max_length: {max_length} is over the tokeniser's limit; at most {limit}")
    if max_length <= added:
        problems.append(
            f"max_length: {max_length} leaves no room for text; "
            f"the tokeniser adds {added} special tokens to each example"
        )
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        problems.append("tokeniser: it has no pad token, and no eos token to pad with instead")
    return problems


def unfit_texts(texts: Sequence[Any], names: Sequence[str]) -> list[str]:
    """One line for each entry that is not a list with a string for every name."""
    return [
        f"text {index}: expected a list of {len(names)} strings ({', '.join(names)}), "
        f"found {entry!r:.80}"
        for index, entry in enumerate(texts)
        if isinstance(entry, str) or list(map(type, entry)) != [str] * len(names)
    ]


def tokenise(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[Sequence[str]], *, max_length: int
) -> tuple[list[Row], int]:
    """Rows without padding, and how many were cut to `max_length`; one call of the tokeniser.

    Args:
        tokenizer: fast or slow; gives `token_type_ids` only if its model takes them.
        texts: one or two strings an example.
        max_length: tokens of an example, special tokens included.
    """
    if not texts:
        return [], 0
    columns = [list(column) for column in zip(*texts, strict=True)]
    found = tokenizer(*columns, truncation=True, max_length=max_length, return_attention_mask=False)
    keys = [key for key in ("input_ids", "token_type_ids") if key in found]
    padding = padding_of(tokenizer)
    # An empty text may give no token at all, and a row without one leaves nothing to attend to.
    lone = {"input_ids": [padding.token_id], "token_type_ids": [padding.type_id]}
    rows: list[Row] = [
        {key: found[key][index] or lone[key] for key in keys} for index in range(len(texts))
    ]
    return rows, _count_cut(tokenizer, found, texts, max_length=max_length)


def pad(rows: Sequence[Row], padding: Padding) -> "dict[str, Tensor]":
    """`input_ids`, `attention_mask` and, if rows have them, `token_type_ids`: int64 (B, T)."""
    ids = [row["input_ids"] for row in rows]
    batch = {
        "input_ids": _padded(ids, padding.token_id, padding.side),
        "attention_mask": _padded([[1] * len(row) for row in ids], 0, padding.side),
    }
    if "token_type_ids" in rows[0]:
        types = [row["token_type_ids"] for row in rows]
        batch["token_type_ids"] = _padded(types, padding.type_id, padding.side)
    return batch


def _count_cut(
    tokenizer: "PreTrainedTokenizerBase",
    found: "BatchEncoding",
    texts: Sequence[Sequence[str]],
    *,
    max_length: int,
) -> int:
    if found.encodings is not None:
        return sum(bool(encoding.overflowing) for encoding in found.encodings)
    # A slow tokeniser does not say; only rows that fill `max_length` can have been cut.
    full = [
        text for text, ids in zip(texts, found["input_ids"], strict=True) if len(ids) == max_length
    ]
    return sum(len(tokenizer(*text, verbose=False)["input_ids"]) > max_length for text in full)


def _padded(rows: Sequence[Sequence[int]], fill: int, side: str) -> "Tensor":
    import torch

    width = max(len(row) for row in rows)
    gaps: list[Any] = [[fill] * (width - len(row)) for row in rows]
    pairs = zip(gaps, rows, strict=True) if side == "left" else zip(rows, gaps, strict=True)
    return torch.tensor([[*first, *second] for first, second in pairs], dtype=torch.int64)
