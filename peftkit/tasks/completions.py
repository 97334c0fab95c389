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


DATE = "26 Jul 2024"
"""Today, for templates that write it as Llama 3's do, which fall back on this one: else the same
rows would be other ids tomorrow."""


@dataclass(frozen=True)
class Turn:
    """An answer, and all that stands before it, as the chat template writes them."""

    asked: str
    answer: str


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
        said = {
            role: [m.get("content") or "" for m in messages if m["role"] == role] for role in ROLES
        }
        asked = ["\n".join(said["user"])] if said["user"] else []
        answers = said["assistant"]
        # Parquet fills what a message lacks with None.
        kept = [{k: v for k, v in m.items() if v is not None} for m in messages]
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
            answer = _after(tokenizer, row["completion"]) if apart else whole[len(prompt) :]
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

    for start in range(0, len(rows), CHUNK):
        cut: list[list[Turn] | str] = []
        for row in rows[start : start + CHUNK]:
            try:
                cut.append(_turns(tokenizer, row["messages"]))
            except (TemplateError, TypeError, ValueError, KeyError) as error:
                cut.append(f"the chat template refuses it: {' '.join(str(error).split())}")
        turns = [turn for found in cut if not isinstance(found, str) for turn in found]
        asked = iter(_plain(tokenizer, [turn.asked for turn in turns]))
        answered = iter(_plain(tokenizer, [turn.asked + turn.answer for turn in turns]))
        for found in cut:
            if isinstance(found, str):
                yield found
            else:
                yield _joined(tokenizer, [(turn, next(asked), next(answered)) for turn in found])


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str]) -> list[list[int]]:
    """What a model is asked with: the ids that `encode_pairs` puts before a completion."""
    opening = opening_of(tokenizer)
    return [_opened(opening, ids) for ids in _plain(tokenizer, list(prompts))]


def question_ids(tokenizer: "PreTrainedTokenizerBase", question: str) -> list[int]:
    """What a model is asked with by a conversation of one message."""
    message = {"role": "user", "content": question}
    return _plain(tokenizer, [_rendered(tokenizer, [message], to_be_answered=True)])[0]


def opening_of(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Special tokens that the tokeniser puts before a text: a BOS, or none."""
    probe = "a"
    plain, framed = tokenizer(probe, add_special_tokens=False)["input_ids"], tokenizer(probe)
    ids: list[int] = framed["input_ids"]
    starts = range(len(ids) - len(plain) + 1)
    return ids[: next(i for i in starts if ids[i : i + len(plain)] == plain)]


def writes_the_date(template: str) -> bool:
    """Whether a chat template writes today's, and takes no other."""
    return "strftime_now" in template and "date_string" not in template


def _turns(
    tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, Any]]
) -> "list[Turn] | str":
    """What each answer follows, and the answer as it stands in the whole conversation."""
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    whole = _rendered(tokenizer, messages[: places[-1] + 1])
    found, done = list[Turn](), 0
    for place in places:
        asked = _rendered(tokenizer, messages[:place], to_be_answered=True)
        answered = whole if place == places[-1] else _rendered(tokenizer, messages[: place + 1])
        answer = whole[len(asked) : _alike(answered, whole)]
        content = str(messages[place].get("content") or "").strip()
        is_kept = content in answer or place == places[-1]
        if not whole.startswith(asked) or len(asked) < done or not is_kept:
            return f"the chat template writes message {place} otherwise once others follow it"
        found.append(Turn(asked, answer))
        done = len(asked) + len(answer)
    return found


def _alike(one: str, other: str) -> int:
    """Characters that two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _joined(
    tokenizer: "PreTrainedTokenizerBase", turns: Sequence[tuple["Turn", list[int], list[int]]]
) -> Encoded:
    """One row of all turns, each with the ids of what is asked and of that with its answer."""
    ids, labels, text, apart = list[int](), list[int](), "", False
    for turn, asked, answered in turns:
        if asked[: len(ids)] != ids:
            apart = True
            asked = [*ids, *_after(tokenizer, turn.asked[len(text) :])]
        joins = answered[: len(asked)] == asked
        apart = apart or not joins
        answer = answered[len(asked) :] if joins else _after(tokenizer, turn.answer)
        labels += [IGNORED] * (len(asked) - len(ids)) + answer
        ids, text = [*asked, *answer], turn.asked + turn.answer
    eos = tokenizer.eos_token_id
    if eos not in labels[-2:]:
        ids, labels = [*ids, eos], [*labels, eos]
    return Encoded(ids, labels, apart)


def _rendered(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[dict[str, Any]],
    *,
    to_be_answered: bool = False,
) -> str:
    """The text of a conversation."""
    return str(
        tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=to_be_answered,
            tokenize=False,
            date_string=DATE,
        )
    )


def _opened(opening: list[int], ids: list[int]) -> list[int]:
    """One opening, also where the text brings it along, as a rendered chat does."""
    return ids if opening and ids[: len(opening)] == opening else [*opening, *ids]


def _after(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Ids of a text that follows others: without the space that some tokenisers begin with."""
    line, behind = _plain(tokenizer, ["\n", f"\n{text}"])
    return behind[len(line) :] if behind[: len(line)] == line else _plain(tokenizer, [text])[0]


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
        if not isinstance(message, Mapping) or not _is_said(message):
            return f"a message is {message!r:.60}, not a role and a content of text"
        if message.get("role") not in ROLES:
            return f"role {message.get('role')!r:.20} is none of {', '.join(ROLES)}"
    if messages[0]["role"] == "assistant":
        return "it begins with an answer"
    if not any(message["role"] == "assistant" for message in messages):
        return "no message is the assistant's"
    return None


def _is_said(message: Mapping[str, Any]) -> bool:
    return isinstance(message.get("content"), str) or bool(message.get("tool_calls"))


def _missing(split: str, data: "Dataset", name: str) -> str | None:
    if name in data.column_names:
        return None
    return f"{split}: no column '{name}'; {suggestion(name, data.column_names)}"


def _at(split: str, column: str, rows: Sequence[int], reason: str) -> str:
    more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
    return f"{split}: column '{column}': row {rows[0]}{more}: {reason}"
