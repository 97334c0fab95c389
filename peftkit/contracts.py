"""What a method and a task must offer, and the plain values that pass between the rooms.

Everything above `modeling` may import this; it imports only the bottom of the order.
A third party implements `Method` or `Task` and names it under the entry points
`peftkit.methods` or `peftkit.tasks`.

Legend: B batch, C classes, T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from peftkit.schema import Section

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = Mapping[str, Any]
"""One tokenised example: `input_ids` (list of int), what else the tokeniser gives, and `label`.

`source_row`, if it is there, is the row's place in its split before cleaning, from 0: errors name
it, so that a person finds the row."""

Metrics = dict[str, float]

LabelKind = Literal["class", "number", "tokens"]
"""An id (B,), a number (B,), or an id for each token (B, T)."""


@dataclass(frozen=True)
class Quantisation:
    """How the base's linear layers are stored; part of what a delta says about its base."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """None takes the dtype of the run's mixed precision."""


@dataclass(frozen=True)
class LoadOptions:
    """How a method wants its base loaded."""

    quantisation: Quantisation | None = None
    frozen: bool = False
    """True if most of the base is frozen: it is then *held* in the 16-bit type of the run."""
    keeps_float32: bool = False
    """True if what is frozen must not be rounded: it is held in float32 in any precision."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate."""

    parameters: "list[nn.Parameter]"
    learning_rate: float


@dataclass(frozen=True)
class Delta:
    """What training changed.

    `adapter`: `tensors` are PEFT's own (adapter name removed) and `adapter_config` is the content
    of `adapter_config.json`. `weights`: `tensors` are the trained parameters by their name in the
    base model, and `adapter_config` is None. Tensors are on the CPU, in their trained dtype.
    """

    kind: Literal["adapter", "weights"]
    tensors: "dict[str, Tensor]"
    adapter_config: dict[str, Any] | None = None


@dataclass(frozen=True)
class Split:
    """One tokenised part of the data, in the order of its source."""

    name: str
    rows: Sequence[Row]
    digest: str
    """`sha256:…` over the cleaned raw rows, in order."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row["input_ids"]) for row in self.rows]


@dataclass(frozen=True)
class TaskData:
    """What a task hands to training and evaluation."""

    train: Split
    holdout: Split | None
    """Held out of *train*: for the best checkpoint, early stopping and learning rates."""
    validation: Split
    """Scored once, at the end; nothing is ever chosen by it."""
    label_names: list[str] | None
    origin: str
    """Where the rows came from: path, mirror, hub or sample."""
    stand_in: bool = False
    """True if the rows are a sample that peftkit made itself."""
    cleaning: dict[str, int] = field(default_factory=dict)
    """Counts of what cleaning did, e.g. `removed_from_train`, `truncated`."""


class Method(Protocol):
    """One way to fine-tune. Holds its own config section; knows no other room."""

    Config: ClassVar[type[Section]]

    def __init__(self, config: Any) -> None: ...

    def load_options(self) -> LoadOptions:
        """How the base is to be loaded."""

    def prepare(self, model: "PreTrainedModel") -> "nn.Module":
        """Change `model` in place so that only this method's parameters train, and return it.

        Raises:
            MethodError: the model has no such layers, depth or architecture.
        """

    def parameter_groups(self, model: "nn.Module", learning_rate: float) -> list[ParameterGroup]:
        """Every trainable parameter of the prepared model, exactly once."""

    def delta(self, model: "nn.Module") -> Delta:
        """What training changed in the prepared model, heads included."""


class Task(Protocol):
    """One kind of data with its model class, loss and metrics."""

    Config: ClassVar[type[Section]]

    def __init__(self, config: Any) -> None: ...

    @property
    def label_kind(self) -> LabelKind:
        """What the `labels` of a batch are."""

    @property
    def metric_names(self) -> list[str]:
        """Names of the metrics, the leading one first.

        Greater is better, but for the names in `training.best.LOWER_IS_BETTER` and where the
        recipe says otherwise.
        """

    def load(self, tokenizer: "PreTrainedTokenizerBase", *, seed: int) -> TaskData:
        """Read, clean, split and tokenise; `seed` draws the held-out part.

        Raises:
            SourceError: the data cannot be found or read.
            DataError: the data does not fit; lists every problem.
        """

    def model_options(self, data: TaskData) -> dict[str, Any]:
        """`auto_class` (name of a transformers Auto class) and keyword arguments of its config."""

    def collate(self, rows: Sequence[Row]) -> "dict[str, Tensor]":
        """Tensors padded to the longest row: the model's inputs (B, T) and `labels`."""

    def loss(self, outputs: Any, labels: "Tensor", *, label_smoothing: float = 0.0) -> "Tensor":
        """Sum of the loss over the batch's items, float32 scalar."""

    def loss_items(self, labels: "Tensor") -> int:
        """Items that `loss` sums over: examples, or unmasked tokens."""

    def predictions(self, outputs: Any, labels: "Tensor") -> "dict[str, Tensor]":
        """Per-example columns, each (B, …): at least `loss`.

        `label` and `prediction` where an example has one of each; `loss_items` where `loss` is the
        sum over several of an example's items, such as its tokens.
        """

    def metrics(self, columns: "dict[str, np.ndarray]") -> Metrics:
        """Metrics over the gathered columns of a whole split."""
