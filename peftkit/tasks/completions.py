"""Prompts with completions, or whole conversations, to token ids and labels.

Called by `sft`; imports `errors` and, from this room, nothing. What is not to be learnt has the
label `IGNORED`. A prompt's ids are those that a server would send for it.
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
ROLES = ("system", "user", "assistant", "tool")

SftRow = dict[str, Any]
"""`texts`: what is asked, unless all are asked alike, and what is answered; `source_row`; and what
is encoded: `prompt` and `completion`, or `messages`."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example, of the same length as their labels; not yet cut."""

    ids: list[int]
    labels: list[int]
    apart: bool = False
    """True if the completion was tokenised by itself: with the prompt the prompt's end changed."""


def template_problem(template: str) -> str | None:
    """What is wrong with a template of text and columns in braces; None if nothing is."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        return f"{error}; a brace that is meant as such is written twice"
    for _, name, form, conversion in parts:
        if name is not None and (not name or set(name) & set(".[]") or form or conversion):
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
    problems = [line for name in names if (line := _missing(split, data, name))]
    if problems or not len(data):
        return [], problems or [f"{split}: the split has no rows"]
    columns = {name: list(data[name][:]) for name in names}
    for name, values in columns.items():
        wrong = [i for i, value in enumerate(values) if not _is_text(value)]
        if wrong:
            problems.append(_at(split, name, wrong, f"{values[wrong[0]]!r:.60} is no text"))
    rows = [] if problems else list(_filled(columns, len(data), prompt, completion))
    return rows, problems


def conversations_of(split: str, data: "Dataset", column: str) -> tuple[list[SftRow], list[str]]:
    """Rows of conversations, and one line for each problem."""
    problem = _missing(split, data, column)
    if problem or not len(data):
        return [], [problem or f"{split}: the split has no rows"]
    rows, wrong = [], dict[str, list[int]]()
    for number, messages in enumerate(list(data[column][:])):
        if reason := _misfit(messages):
            wrong.setdefault(reason, []).append(number)
            continue
        others = [m["content"] for m in messages if m["role"] != "assistant"]
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        asked = ["\n".join(others)] if others else []
        kept = [{"role": m["role"], "content": m["content"]} for m in messages]
        rows.append({"texts": [*asked, *answers], "messages": kept, "source_row": number})
    return rows, [_at(split, column, where, reason) for reason, where in wrong.items()]


def encode_pairs(
    tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Mapping[str, Any]]
) -> Iterator[Encoded]:
    """Each as what opens every text, the prompt, the completion and the eos token.

    The whole text is tokenised as one, unless that would change the prompt's own tokens.
    """
    opening, eos = opening_of(tokenizer), tokenizer.eos_token_id
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        prompts = _plain(tokenizer, [row["prompt"] for row in chunk])
        wholes = _plain(tokenizer, [row["prompt"] + row["completion"] for row in chunk])
        for row, prompt, whole in zip(chunk, prompts, wholes, strict=True):
            apart = whole[: len(prompt)] != prompt
            alone = _plain(tokenizer, [row["completion"]])[0] if apart else []
            answer = alone if apart else whole[len(prompt) :]
            answer = answer if answer[-1:] == [eos] else [*answer, eos]
            asked = _opened(opening, prompt)
            yield Encoded(asked + answer, [IGNORED] * len(asked) + answer, apart)


def encode_conversations(
    tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Mapping[str, Any]]
) -> Iterator[Encoded | str]:
    """Each by the tokeniser's chat template up to its last answer; every answer is learnt.

    Yields a reason in place of a conversation that the template refuses, or whose earlier turns it
    writes otherwise once later ones follow: what it trains on would not be what it is asked.
    """
    from jinja2 import TemplateError

    for row in rows:
        try:
            yield _conversation(tokenizer, row["messages"])
        except TemplateError as error:
            yield f"the chat template refuses it: {error}"


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str]) -> list[list[int]]:
    """What a model is asked with: the ids that `encode_pairs` puts before a completion."""
    opening = opening_of(tokenizer)
    return [_opened(opening, ids) for ids in _plain(tokenizer, list(prompts))]


def question_ids(tokenizer: "PreTrainedTokenizerBase", question: str) -> list[int]:
    """What a model is asked with by a conversation of one message."""
    return _rendered(tokenizer, [{"role": "user", "content": question}], to_be_answered=True)


def opening_of(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Special tokens that the tokeniser puts before a text: a BOS, or none."""
    probe = "a"
    plain, framed = tokenizer(probe, add_special_tokens=False)["input_ids"], tokenizer(probe)
    ids: list[int] = framed["input_ids"]
    starts = range(len(ids) - len(plain) + 1)
    return ids[: next(i for i in starts if ids[i : i + len(plain)] == plain)]


def _conversation(
    tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, str]]
) -> Encoded | str:
    ids, labels = list[int](), list[int]()
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = _rendered(tokenizer, messages[:number], to_be_answered=True)
        answered = _rendered(tokenizer, messages[: number + 1])
        if asked[: len(ids)] != ids or answered[: len(asked)] != asked:
            return f"the chat template writes what comes before message {number} otherwise after it"
        labels += [IGNORED] * (len(asked) - len(ids)) + answered[len(asked) :]
        ids = answered
    ends = tokenizer.eos_token_id
    return Encoded(ids, labels) if ends in labels[-2:] else Encoded([*ids, ends], [*labels, ends])


def _rendered(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[dict[str, str]],
    *,
    to_be_answered: bool = False,
) -> list[int]:
    ids: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=to_be_answered, tokenize=True, return_dict=False
    )
    return list(ids)


def _opened(opening: list[int], ids: list[int]) -> list[int]:
    """One opening, also where the text brings it along, as a rendered chat does."""
    return ids if opening and ids[: len(opening)] == opening else [*opening, *ids]


def _plain(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    return list(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])


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


def _misfit(messages: Any) -> str | None:
    """Why these are no messages with an answer; None: they are."""
    if not isinstance(messages, list) or not messages:
        return "no list of messages"
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            return f"a message is {message!r:.60}, not a role and a content of text"
        if message.get("role") not in ROLES:
            return f"role {message.get('role')!r:.20} is none of {', '.join(ROLES)}"
    if messages[0]["role"] == "assistant":
        return "it begins with an answer"
    if not any(message["role"] == "assistant" for message in messages):
        return "no message is the assistant's"
    return None


def _missing(split: str, data: "Dataset", name: str) -> str | None:
    if name in data.column_names:
        return None
    return f"{split}: no column '{name}'; {suggestion(name, data.column_names)}"


def _at(split: str, column: str, rows: Sequence[int], reason: str) -> str:
    more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
    return f"{split}: column '{column}': row {rows[0]}{more}: {reason}"
