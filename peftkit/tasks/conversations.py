"""Conversations by the tokeniser's chat template, to token ids and labels.

Called by `sft`; imports from this room `completions`. The text of a conversation is cut into turns:
an answer, which is learnt, and all that stands before it, which is what a server would send.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftkit.tasks.completions import (
    CHUNK,
    IGNORED,
    Encoded,
    SftRow,
    ids_after,
    missing_column,
    plain_ids,
    row_problem,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant", "tool")
DATE = "26 Jul 2024"
"""Today, for templates that write it as Llama 3's do, which fall back on this one: else the same
rows would be other ids tomorrow."""


@dataclass(frozen=True)
class Turn:
    """An answer, and all that stands before it, as the chat template writes them."""

    asked: str
    answer: str


def conversations_of(split: str, data: "Dataset", column: str) -> tuple[list[SftRow], list[str]]:
    """Rows of conversations, and one line for each problem."""
    problem = missing_column(split, data, column)
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
    return rows, [row_problem(split, column, where, reason) for reason, where in wrong.items()]


def unfit_template(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """One line for each reason why this tokeniser cannot write conversations."""
    template = tokenizer.chat_template
    if not isinstance(template, str):
        return [
            "messages_column: the tokeniser has no chat template; take the chat version of the "
            "base, or `prompt` and `completion`"
        ]
    if "strftime_now" in template and "date_string" not in template:
        return [
            "messages_column: the chat template writes today's date, so the same rows would be "
            "others tomorrow; save the tokeniser with one that does not call `strftime_now`"
        ]
    return []


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
        asked = iter(plain_ids(tokenizer, [turn.asked for turn in turns]))
        answered = iter(plain_ids(tokenizer, [turn.asked + turn.answer for turn in turns]))
        for found in cut:
            if isinstance(found, str):
                yield found
            else:
                yield _joined(tokenizer, [(turn, next(asked), next(answered)) for turn in found])


def question_ids(tokenizer: "PreTrainedTokenizerBase", question: str) -> list[int]:
    """What a model is asked with by a conversation of one message."""
    message = {"role": "user", "content": question}
    return plain_ids(tokenizer, [_rendered(tokenizer, [message], to_be_answered=True)])[0]


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
            asked = [*ids, *ids_after(tokenizer, turn.asked[len(text) :])]
        joins = answered[: len(asked)] == asked
        apart = apart or not joins
        answer = answered[len(asked) :] if joins else ids_after(tokenizer, turn.answer)
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
