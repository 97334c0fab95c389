"""Prompts with completions to token ids and labels.

Called by `sft` and, for what they have in common, by `conversations`; imports `errors`. What is not
to be learnt has the label `IGNORED`. A prompt's ids are those that a server would send for it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import TYPE_CHECKING, Any

from peftkit.errors import suggestion

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that no loss is computed for, as in transformers."""
CHUNK = 1000
"""Rows that are tokenised in one call: a fast tokeniser uses all cores, and holds all of it."""
SftRow = dict[str, Any]
"""`texts`: what is asked, unless all are asked alike, and what is answered; `source_row`; and what
is encoded: `prompt` and `completion`, or `messages`."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example, of the same length as their labels; not yet cut."""

    ids: list[int]
    labels: list[int]
    apart: bool = False
    """True if an answer was tokenised by itself, as what is asked would end otherwise with it."""


def template_problem(template: str) -> str | None:
    """What is wrong with a template of text and columns in braces; None if nothing is."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        return f"{error}; a brace that is meant as such is written twice"
    for _, name, form, conversion in parts:
        odd = name is not None and (not name or name.isdigit() or set(name) & set(".[]"))
        if odd or form or conversion:
            return f"'{{{name}}}' is no column; a column's name stands in braces, and nothing else"
    return None


def columns_of(template: str) -> list[str]:
    """The columns that a template reads, in its order."""
    return [name for _, name, _, _ in Formatter().parse(template) if name]


def pairs_of(
    split: str, data: "Dataset", prompt: str, completion: str
) -> tuple[list[SftRow], list[str]]:
    """Rows of two templates filled in, and one line for each problem."""
    names = dict.fromkeys(columns_of(prompt) + columns_of(completion))
    problems = [line for name in names if (line := missing_column(split, data, name))]
    if problems or not len(data):
        return [], problems or [f"{split}: the split has no rows"]
    columns = {name: list(data[name][:]) for name in names}
    for name, values in columns.items():
        wrong = [i for i, value in enumerate(values) if not _is_text(value)]
        if wrong:
            problems.append(row_problem(split, name, wrong, f"{values[wrong[0]]!r:.60} is no text"))
    rows = [] if problems else list(_filled(columns, len(data), prompt, completion))
    return rows, problems


def encode_pairs(
    tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Mapping[str, Any]]
) -> Iterator[Encoded]:
    """Each as what opens every text, the prompt, the completion and the eos token.

    The whole text is tokenised as one, unless that would change the prompt's own tokens.
    """
    opening, eos = opening_of(tokenizer), tokenizer.eos_token_id
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        prompts = plain_ids(tokenizer, [row["prompt"] for row in chunk])
        wholes = plain_ids(tokenizer, [row["prompt"] + row["completion"] for row in chunk])
        for row, prompt, whole in zip(chunk, prompts, wholes, strict=True):
            apart = whole[: len(prompt)] != prompt
            answer = ids_after(tokenizer, row["completion"]) if apart else whole[len(prompt) :]
            answer = answer if answer[-1:] == [eos] else [*answer, eos]
            asked = _opened(opening, prompt)
            yield Encoded(asked + answer, [IGNORED] * len(asked) + answer, apart)


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str]) -> list[list[int]]:
    """What a model is asked with: the ids that `encode_pairs` puts before a completion."""
    opening = opening_of(tokenizer)
    return [_opened(opening, ids) for ids in plain_ids(tokenizer, list(prompts))]


def opening_of(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Special tokens that the tokeniser puts before a text: a BOS, or none."""
    probe = "a"
    plain, framed = tokenizer(probe, add_special_tokens=False)["input_ids"], tokenizer(probe)
    ids: list[int] = framed["input_ids"]
    starts = range(len(ids) - len(plain) + 1)
    return ids[: next(i for i in starts if ids[i : i + len(plain)] == plain)]


def ids_after(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Ids of a text that follows others: without the space that some tokenisers begin with."""
    line, behind = plain_ids(tokenizer, ["\n", f"\n{text}"])
    return behind[len(line) :] if behind[: len(line)] == line else plain_ids(tokenizer, [text])[0]


def plain_ids(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    """Ids of texts, without what the tokeniser puts around them."""
    if not texts:
        return []
    return list(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])


def missing_column(split: str, data: "Dataset", name: str) -> str | None:
    """A line if the split has no such column."""
    if name in data.column_names:
        return None
    return f"{split}: no column '{name}'; {suggestion(name, data.column_names)}"


def row_problem(split: str, column: str, rows: Sequence[int], reason: str) -> str:
    """A line of what is wrong with some rows of a column."""
    return f"{split}: column '{column}': {places(rows)}: {reason}"


def places(rows: Sequence[int]) -> str:
    """The first of some rows, and how many more there are."""
    return f"row {rows[0]}" + (f" and {len(rows) - 1} more" if len(rows) > 1 else "")


def _opened(opening: list[int], ids: list[int]) -> list[int]:
    """One opening, also where the text brings it along, as a rendered chat does."""
    return ids if opening and ids[: len(opening)] == opening else [*opening, *ids]


def _filled(
    columns: Mapping[str, list[Any]], count: int, prompt: str, completion: str
) -> Iterable[SftRow]:
    for number in range(count):
        values = {name: str(column[number]) for name, column in columns.items()}
        asked, answered = prompt.format_map(values), completion.format_map(values)
        texts = [asked, answered] if columns_of(prompt) else [answered]
        yield {
            "texts": texts,
            "prompt": asked,
            "completion": answered,
            "source_row": number,
        }


def _is_text(value: Any) -> bool:
    """Or a number that can be written as one; NaN, which equals nothing, stands for no value."""
    return isinstance(value, str | int | float) and value == value
