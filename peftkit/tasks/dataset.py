"""Where a task's rows come from: what every task's section has in common.

Called by the tasks; imports `data.sources`.
"""

from typing import TYPE_CHECKING

from pydantic import Field, ValidationInfo, field_validator

from peftkit.data.sources import Located, locate, offline_problem, read_splits
from peftkit.schema import Section

if TYPE_CHECKING:
    from datasets import Dataset


class DatasetSection(Section):
    """A data set with a split to train on and one to score."""

    type: str
    """Which task this section configures."""
    dataset: str = Field(min_length=1)
    """Folder, or Hub id such as `nyu-mll/glue`."""
    dataset_config: str | None = None
    """Configuration of the data set, such as `sst2`."""
    revision: str | None = None
    """Commit, tag or branch of the data set on the Hub."""
    offline: str | None = None
    """What to use where the data set cannot be had: `sample:<name>`."""
    train_split: str = Field(default="train", min_length=1)
    """The split that is trained on."""
    validation_split: str = Field(default="validation", min_length=1, validate_default=True)
    """The split that is scored once, at the end."""
    holdout_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the training rows held out to choose the best checkpoint; 0 holds out none."""
    max_train_examples: int | None = Field(default=None, ge=1)
    """Rows drawn from the cleaned training split, the held-out ones included; None takes all."""

    @field_validator("offline")
    @classmethod
    def _known_sample(cls, value: str | None) -> str | None:
        if value is not None and (problem := offline_problem("datasets", value)):
            raise ValueError(problem.removeprefix("offline: "))
        return value

    @field_validator("validation_split")
    @classmethod
    def _not_the_training_split(cls, value: str, info: ValidationInfo) -> str:
        if value == info.data.get("train_split"):
            raise ValueError(f"evaluating on the training split '{value}'; name another split")
        return value

    def read(self) -> "tuple[Located, dict[str, Dataset]]":
        """Where the data set was found, and its two splits by name, the training split first.

        Raises:
            SourceError: it cannot be found or read.
        """
        located = locate(
            "datasets",
            self.dataset,
            config=self.dataset_config,
            revision=self.revision,
            offline=self.offline,
        )
        names = [self.train_split, self.validation_split]
        splits = read_splits(located, names)
        return located, {name: splits[name] for name in names}
