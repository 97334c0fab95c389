"""Texts, alone or in pairs, to a class or a number.

Called by the experiment and by prediction; imports `data` and, within functions, torch.
Legend: B batch, C classes (1 for a regression), T tokens of the batch's longest row.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from peftkit.contracts import LabelKind, Metrics, Row, TaskData
from peftkit.errors import DataError
from peftkit.schema import Section
from peftkit.tasks import metrics
from peftkit.tasks.columns import Columns, Parsed, parse
from peftkit.tasks.dataset import DatasetSection
from peftkit.tasks.encoding import Padding, pad, padding_of, tokenise, unfit_lengths, unfit_texts
from peftkit.tasks.parts import separate, tokenise_parts

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

GLUE = "nyu-mll/glue"


class ClassificationConfig(DatasetSection):
    """The `task` section of a recipe that classifies texts or predicts a number for them."""

    type: Literal["classification"]
    """Which task this section configures."""
    text_columns: list[str] = Field(min_length=1, max_length=2)
    """The column of the text, or the two columns of a pair, in the order the model reads them."""
    label_column: str = Field(default="label", validate_default=True)
    """The column of the label."""
    labels: list[str] | None = Field(default=None, min_length=2)
    """Names of the labels in id order; None takes the data's own. Integer labels are ids."""
    problem: Literal["classification", "regression"] = Field(
        default="classification", validate_default=True
    )
    """`regression` predicts one number, trained by the squared error."""
    metrics: list[str] | None = Field(default=None, min_length=1)
    """The leading one first; None takes GLUE's own for `nyu-mll/glue`, else accuracy, or pearsonr
    and spearmanr for a regression."""
    max_length: int = Field(default=128, ge=1)
    """Tokens of an example, special tokens included; the rest is cut off."""

    @field_validator("text_columns")
    @classmethod
    def _two_different_columns(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError(f"column '{value[0]}' is named twice; name two different columns")
        return value

    @field_validator("label_column")
    @classmethod
    def _label_is_no_text(cls, value: str, info: ValidationInfo) -> str:
        if value in info.data.get("text_columns", []):
            raise ValueError(f"column '{value}' is a text column; name the column of the label")
        return value

    @field_validator("labels", "metrics")
    @classmethod
    def _each_name_once(cls, value: list[str] | None) -> list[str] | None:
        twice = sorted({name for name in value or [] if (value or []).count(name) > 1})
        if twice:
            raise ValueError(f"each name stands once, found twice: {', '.join(twice)}")
        return value

    @field_validator("problem")
    @classmethod
    def _no_labels_in_a_regression(cls, value: str, info: ValidationInfo) -> str:
        if value == "regression" and info.data.get("labels"):
            raise ValueError("a regression has no labels; leave `labels` out")
        return value

    @field_validator("metrics")
    @classmethod
    def _metrics_that_fit(cls, value: list[str] | None, info: ValidationInfo) -> list[str] | None:
        labels = info.data.get("labels")
        count = 1 if info.data.get("problem") == "regression" else len(labels) if labels else 2
        if problems := metrics.unfit(value or [], num_labels=count):
            raise ValueError("; ".join(p.removeprefix("metrics: ") for p in problems))
        return value


class Classification:
    """A `Task` whose rows are one or two texts and whose model has a classification head."""

    Config: ClassVar[type[Section]] = ClassificationConfig

    def __init__(self, config: ClassificationConfig) -> None:
        self.config = config
        self._padding: Padding | None = None

    @property
    def metric_names(self) -> list[str]:
        """Names of the metrics, the leading one first."""
        if self.config.metrics is not None:
            return list(self.config.metrics)
        glue = metrics.GLUE_METRICS.get(self.config.dataset_config or "")
        if self.config.dataset == GLUE and glue:
            return list(glue)
        return ["pearsonr", "spearmanr"] if self._regression else ["accuracy"]

    @property
    def label_kind(self) -> LabelKind:
        """An id, or the number of a regression."""
        return "number" if self._regression else "class"

    @property
    def _regression(self) -> bool:
        return self.config.problem == "regression"

    def load(self, tokenizer: "PreTrainedTokenizerBase", *, seed: int) -> TaskData:
        """Read, check, clean, split and tokenise; `seed` draws the subset and the held-out part.

        Validation rows are never dropped: an empty text stays, and is counted. Digests cover texts
        and label ids, not the names of the columns.

        Raises:
            SourceError: the data cannot be found or read.
            DataError: the data does not fit the section or the tokeniser; lists every problem.
        """
        config = self.config
        located, splits = config.read()
        parsed = parse(splits, self._columns)
        self._check(tokenizer, parsed)
        train, validation = (parsed.rows[name] for name in splits)
        parts, counts = separate(
            train,
            validation,
            max_train=config.max_train_examples,
            holdout_fraction=config.holdout_fraction,
            seed=seed,
        )
        self._padding = padding_of(tokenizer)
        ready, cut = tokenise_parts(tokenizer, parts, max_length=config.max_length)
        return TaskData(
            train=ready["train"],
            holdout=ready.get("holdout"),
            validation=ready["validation"],
            label_names=parsed.label_names,
            origin=located.origin,
            stand_in=located.origin == "sample",
            cleaning=counts | {"truncated": cut},
        )

    @property
    def _columns(self) -> Columns:
        config = self.config
        return Columns(config.text_columns, config.label_column, config.labels, self._regression)

    def _check(self, tokenizer: "PreTrainedTokenizerBase", parsed: Parsed) -> None:
        """Raise every problem of the rows, the lengths and the metrics at once."""
        pair = len(self.config.text_columns) == 2
        lengths = unfit_lengths(tokenizer, self.config.max_length, pair=pair)
        problems = [*parsed.problems, *lengths]
        problems += metrics.unloadable(self.metric_names)
        if self._regression or parsed.label_names:
            count = len(parsed.label_names or [""])
            problems += metrics.unfit(self.metric_names, num_labels=count)
        if problems:
            raise DataError(problems)

    def encode(
        self, tokenizer: "PreTrainedTokenizerBase", texts: Sequence[Sequence[str]]
    ) -> list[Row]:
        """Tokenise as for training; each entry holds one string a text column. Rows have no label.

        Raises:
            DataError: an entry is not a list of that many strings.
        """
        problems = unfit_texts(texts, self.config.text_columns)
        if problems:
            raise DataError(problems)
        self._padding = padding_of(tokenizer)
        return tokenise(tokenizer, texts, max_length=self.config.max_length)[0]

    def model_options(self, data: TaskData) -> dict[str, Any]:
        """The Auto class and its config's keyword arguments; labels are named both ways."""
        options: dict[str, Any] = {"auto_class": "AutoModelForSequenceClassification"}
        if self._padding is not None:
            # Decoders score the last token that is not this one: it must be the id padded with.
            options["pad_token_id"] = self._padding.token_id
        names = data.label_names
        if names is None:
            return options | {"num_labels": 1, "problem_type": "regression"}
        return options | {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: number for number, name in enumerate(names)},
            "problem_type": "single_label_classification",
        }

    def collate(self, rows: Sequence[Row]) -> "dict[str, Tensor]":
        """`input_ids`, `attention_mask` and, if the rows have them, `token_type_ids`, int64 (B, T).

        `labels` (B,) are int64 ids, float32 for a regression; left out if the rows have none.
        """
        import torch

        assert self._padding is not None, "rows come from `load` or `encode` of this task"
        batch = pad(rows, self._padding)
        if "label" in rows[0]:
            dtype = torch.float32 if self._regression else torch.int64
            batch["labels"] = torch.tensor([row["label"] for row in rows], dtype=dtype)
        return batch

    def loss(self, outputs: Any, labels: "Tensor", *, label_smoothing: float = 0.0) -> "Tensor":
        """Cross entropy, or squared error of a regression, summed over the batch in float32.

        Raises:
            DataError: label smoothing of a regression.
        """
        return self._losses(outputs, labels, label_smoothing).sum()

    def loss_items(self, labels: "Tensor") -> int:
        """B."""
        return len(labels)

    def predictions(self, outputs: Any, labels: "Tensor") -> "dict[str, Tensor]":
        """`label`, `prediction` and `loss` (B,), and `logits` float32 (B, C)."""
        logits = outputs.logits.float()
        return {
            "label": labels,
            "prediction": logits.squeeze(-1) if self._regression else logits.argmax(-1),
            "loss": self._losses(outputs, labels, 0.0),
            "logits": logits,
        }

    def metrics(self, columns: "dict[str, np.ndarray]") -> Metrics:
        """The metrics of `metric_names` over whole columns."""
        return metrics.compute(self.metric_names, columns["prediction"], columns["label"])

    def _losses(self, outputs: Any, labels: "Tensor", label_smoothing: float) -> "Tensor":
        from torch.nn import functional

        logits = outputs.logits.float()
        if not self._regression:
            return functional.cross_entropy(
                logits, labels, reduction="none", label_smoothing=label_smoothing
            )
        if label_smoothing:
            raise DataError("label_smoothing: a regression has no labels to smooth; set it to 0")
        return functional.mse_loss(logits.squeeze(-1), labels.float(), reduction="none")
