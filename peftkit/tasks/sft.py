"""Supervised fine-tuning of a language model: a prompt and what is to follow it.

Called by the experiment; imports `data` and, within functions, torch. The loss is that of the
tokens of the completion, or of every answer of a conversation, and counts by tokens.
Legend: B batch, T tokens of the batch's longest row, V vocabulary.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from peftkit.contracts import LabelKind, Metrics, Row, Split, TaskData
from peftkit.data.splits import rows_digest
from peftkit.errors import DataError
from peftkit.schema import Section
from peftkit.tasks.completions import (
    IGNORED,
    Encoded,
    SftRow,
    columns_of,
    encode_pairs,
    pairs_of,
    places,
    prompt_ids,
    template_problem,
)
from peftkit.tasks.conversations import (
    conversations_of,
    encode_conversations,
    question_ids,
    unfit_template,
)
from peftkit.tasks.dataset import DatasetSection
from peftkit.tasks.encoding import Padding, pad, padding_of, unfit_lengths, unfit_texts
from peftkit.tasks.parts import separate

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

PROMPT, COMPLETION = "{prompt}", "{completion}"
MAX_LOSS = 700.0
"""Nats a token, of which the exponential is still a number."""


class SftConfig(DatasetSection):
    """The `task` section of a recipe that teaches a language model to answer."""

    type: Literal["sft"]
    """Which task this section configures."""
    prompt: str = PROMPT
    """What is asked: text with columns in braces, such as `Question: {question}`. It is read and
    not learnt. Empty: every token is learnt."""
    completion: str = Field(default=COMPLETION, validate_default=True)
    """What is to follow, likewise; all of it is learnt, and the eos token after it."""
    messages_column: str | None = None
    """The column of conversations, lists of `role` and `content`, in place of `prompt` and
    `completion`; the tokeniser's chat template writes them, and every answer is learnt."""
    max_length: int = Field(default=512, ge=2)
    """Tokens of an example, special tokens included; the rest is cut off."""

    @field_validator("prompt", "completion")
    @classmethod
    def _template(cls, value: str) -> str:
        if problem := template_problem(value):
            raise ValueError(problem)
        return value

    @field_validator("completion")
    @classmethod
    def _of_the_data(cls, value: str) -> str:
        if not columns_of(value):
            raise ValueError("it names no column, so every completion would be the same")
        return value

    @field_validator("messages_column")
    @classmethod
    def _one_or_the_other(cls, value: str | None, info: ValidationInfo) -> str | None:
        given = (info.data.get("prompt", PROMPT), info.data.get("completion", COMPLETION))
        if value is not None and given != (PROMPT, COMPLETION):
            raise ValueError("conversations have no `prompt` and `completion`; leave them out")
        return value


class Sft:
    """A `Task` whose rows are token ids with a label for each, `IGNORED` where none is learnt."""

    Config: ClassVar[type[Section]] = SftConfig

    def __init__(self, config: SftConfig) -> None:
        self.config = config
        self._padding: Padding | None = None

    @property
    def label_kind(self) -> LabelKind:
        """An id for each token."""
        return "tokens"

    @property
    def metric_names(self) -> list[str]:
        """`perplexity`, and the share of learnt tokens that the model would have chosen."""
        return ["perplexity", "token_accuracy"]

    def load(self, tokenizer: "PreTrainedTokenizerBase", *, seed: int) -> TaskData:
        """Read, check, clean, split and tokenise; `seed` draws the subset and the held-out part.

        No prompt of validation is in train, whatever follows it. `cleaning` counts the examples
        that were `truncated`, those `fully_masked` (cut before their completion began, so nothing
        of them could be learnt: left out), and those `tokenised_apart` (the completion by
        itself, as in one with the prompt the prompt's last token would be another).

        Raises:
            SourceError: the data cannot be found or read.
            DataError: the data does not fit the section or the tokeniser; lists every problem.
        """
        config = self.config
        located, splits = config.read()
        found = {name: self._rows(name, data) for name, data in splits.items()}
        problems = [line for _, lines in found.values() for line in lines]
        problems += self._unfit(tokenizer)
        if problems:
            raise DataError(problems)
        train, validation = (rows for rows, _ in found.values())
        parts, counts = separate(
            train,
            validation,
            max_train=config.max_train_examples,
            holdout_fraction=config.holdout_fraction,
            seed=seed,
            key=lambda row: [row["texts"][0]],
        )
        self._padding = padding_of(tokenizer)
        ready = self._tokenised(tokenizer, parts, counts)
        return TaskData(
            train=ready["train"],
            holdout=ready.get("holdout"),
            validation=ready["validation"],
            label_names=None,
            origin=located.origin,
            stand_in=located.origin == "sample",
            cleaning=counts,
        )

    def encode(
        self, tokenizer: "PreTrainedTokenizerBase", texts: Sequence[Sequence[str]]
    ) -> list[Row]:
        """What the model is asked with, as in training: rows without labels, to be continued.

        Args:
            tokenizer: The base's.
            texts: For each, a string for every column of the prompt. One if it has none, which
                then follows the prompt; and one if conversations were learnt, as the user's.

        Raises:
            DataError: an entry is not a list of that many strings.
        """
        chat = self.config.messages_column is not None
        names = list(dict.fromkeys([] if chat else columns_of(self.config.prompt))) or ["text"]
        problems = unfit_texts(texts, names)
        if problems:
            raise DataError(problems)
        self._padding = padding_of(tokenizer)
        if chat:
            rows = [question_ids(tokenizer, entry[0]) for entry in texts]
        else:
            own = self.config.prompt
            template = own if columns_of(own) else own + "{text}"
            asked = [template.format_map(dict(zip(names, entry, strict=True))) for entry in texts]
            rows = prompt_ids(tokenizer, asked)
        if [] in rows:
            raise DataError("an empty text has no token that anything could follow")
        return [{"input_ids": ids} for ids in rows]

    def model_options(self, data: TaskData) -> dict[str, Any]:
        """A causal language model, as the base configures it."""
        return {"auto_class": "AutoModelForCausalLM"}

    def collate(self, rows: Sequence[Row]) -> "dict[str, Tensor]":
        """`input_ids`, `attention_mask` and, if the rows have them, `labels`: int64 (B, T).

        Labels are the ids themselves where they are learnt: `loss` shifts them. Padding is
        `IGNORED` by its place, so that an eos token which also serves as padding is still learnt.
        """
        import torch

        assert self._padding is not None, "rows come from `load` or `encode` of this task"
        is_learnt = "labels" in rows[0]
        # Positions are counted from the left, padding included; what is written follows the last.
        padding = replace(self._padding, side="right" if is_learnt else "left")
        batch = pad([{"input_ids": row["input_ids"]} for row in rows], padding)
        if not is_learnt:
            return batch
        width = batch["input_ids"].shape[1]
        labels = [[*row["labels"], *[IGNORED] * (width - len(row["labels"]))] for row in rows]
        return batch | {"labels": torch.tensor(labels, dtype=torch.int64)}

    def loss(self, outputs: Any, labels: "Tensor", *, label_smoothing: float = 0.0) -> "Tensor":
        """Cross entropy of the learnt tokens, summed over the batch in float32."""
        return self._losses(outputs, labels, label_smoothing).sum()

    def loss_items(self, labels: "Tensor") -> int:
        """Learnt tokens; a row's first is never one, as nothing comes before it."""
        return int((labels[:, 1:] != IGNORED).sum())

    def predictions(self, outputs: Any, labels: "Tensor") -> "dict[str, Tensor]":
        """`loss` (its sum), `loss_items` and `correct`, of each example's learnt tokens, (B,)."""
        following = labels[:, 1:]
        return {
            "loss": self._losses(outputs, labels, 0.0).sum(-1),
            "loss_items": (following != IGNORED).sum(-1),
            "correct": (outputs.logits[:, :-1].argmax(-1) == following).sum(-1),
        }

    def metrics(self, columns: "dict[str, np.ndarray]") -> Metrics:
        """The metrics of `metric_names` over all tokens of whole columns."""
        tokens = int(columns["loss_items"].sum())
        mean = float(columns["loss"].sum(dtype="float64")) / tokens
        return {
            "perplexity": math.exp(min(mean, MAX_LOSS)),
            "token_accuracy": float(columns["correct"].sum()) / tokens,
        }

    def _rows(self, split: str, data: "Dataset") -> tuple[list[SftRow], list[str]]:
        if self.config.messages_column is not None:
            return conversations_of(split, data, self.config.messages_column)
        return pairs_of(split, data, self.config.prompt, self.config.completion)

    def _unfit(self, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
        problems = unfit_lengths(tokenizer, self.config.max_length, pair=False)
        if tokenizer.eos_token_id is None:
            problems.append("tokeniser: it has no eos token, so no model could learn to stop")
        is_chat = self.config.messages_column is not None
        return problems + (unfit_template(tokenizer) if is_chat else [])

    def _tokenised(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        parts: Mapping[str, list[SftRow]],
        counts: dict[str, int],
    ) -> dict[str, Split]:
        """The parts as splits; adds to `counts`."""
        encode = encode_pairs if self.config.messages_column is None else encode_conversations
        ready, problems = dict[str, Split](), list[str]()
        counts |= {"truncated": 0, "fully_masked": 0, "tokenised_apart": 0}
        for name, rows in parts.items():
            made, refused = list[Row](), dict[str, list[int]]()
            for row, encoded in zip(rows, encode(tokenizer, rows), strict=True):
                if isinstance(encoded, str):
                    refused.setdefault(encoded, []).append(row["source_row"])
                else:
                    made.append(self._row(encoded, row["source_row"], counts))
            problems += [f"{name}: {places(at)}: {reason}" for reason, at in refused.items()]
            learnt = [row for row in made if any(x != IGNORED for x in row["labels"][1:])]
            counts["fully_masked"] += len(made) - len(learnt)
            if made and not learnt:
                problems.append(
                    f"{name}: each of the {len(made)} examples is cut before its completion "
                    f"begins; raise max_length ({self.config.max_length})"
                )
            ready[name] = Split(name, learnt, rows_digest(_contents(rows)))
        if problems:
            raise DataError(problems)
        return ready

    def _row(self, encoded: Encoded, source_row: int, counts: dict[str, int]) -> Row:
        limit = self.config.max_length
        counts["truncated"] += len(encoded.ids) > limit
        counts["tokenised_apart"] += encoded.apart
        ids, labels = encoded.ids[:limit], encoded.labels[:limit]
        return {"input_ids": ids, "labels": labels, "source_row": source_row}

    def _losses(self, outputs: Any, labels: "Tensor", label_smoothing: float) -> "Tensor":
        """Of each token after the first, float32 (B, T - 1); 0 where it is not learnt."""
        from torch.nn import functional

        logits, following = outputs.logits[:, :-1], labels[:, 1:]
        # Flat, as the classes of a batch of rows are read two and a half times as slowly.
        losses = functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]).float(),
            following.reshape(-1),
            ignore_index=IGNORED,
            reduction="none",
            label_smoothing=label_smoothing,
        )
        return losses.view_as(following)


def _contents(rows: Iterable[SftRow]) -> Iterable[Mapping[str, Any]]:
    for row in rows:
        yield {k: row[k] for k in ("prompt", "completion", "messages") if k in row}
