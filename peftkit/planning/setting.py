"""All that the memory of a run depends on, from a recipe or from a run that is about to start.

Called by the prediction's users; reads the base's config and no weights.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from peftkit import plugins
from peftkit.contracts import Method, Split, Task, TaskData
from peftkit.data.batching import evaluation_batches, longest_step, plan_epoch, share_step
from peftkit.modeling.base import BaseConfig, resolve_base
from peftkit.modeling.config import read_config
from peftkit.modeling.loading import ModelSpec, spec_config
from peftkit.recipe import Recipe
from peftkit.training.config import TrainingConfig

DEFAULT_LENGTH = 128
"""Tokens of an example where the task has no `max_length`."""


@dataclass(frozen=True)
class Shape:
    """Size of one micro-batch."""

    examples: int
    tokens: int
    """Of each example, padding included."""
    padded: bool = True
    """Whether some are shorter: with a mask attention keeps more, or runs another kernel."""


@dataclass(frozen=True)
class Setting:
    """What is trained, and in which batches."""

    method: Method
    task: Task
    training: TrainingConfig
    spec: ModelSpec
    config: PretrainedConfig
    train: Shape
    evaluation: Shape
    on_gpu: bool = False
    """Whether to count the tensors of a GPU's kernels, where they differ from a CPU's."""

    @property
    def method_section(self) -> Any:
        """The method's own section; a plugin's may lack it."""
        return getattr(self.method, "config", None)

    @property
    def method_type(self) -> str:
        """As in `method.type`."""
        return str(getattr(self.method_section, "type", type(self.method).__name__))

    def with_batch(self, examples: int) -> "Setting":
        """The same with another per-device batch size."""
        return replace(self, train=replace(self.train, examples=examples))


def of_recipe(
    recipe: Recipe, *, length: int | None = None, mixed_precision: str = "no", on_gpu: bool = False
) -> Setting:
    """The worst case of a recipe: every example as long as the task lets it be.

    Raises:
        SourceError: the base's config cannot be found or used.
    """
    method, task = build_method(recipe), build_task(recipe)
    folder = config_folder(recipe.base)
    names = _label_names(recipe.task)
    options = task.model_options(_no_data(names))
    if read_config(folder).get_text_config().pad_token_id is None:
        options.setdefault("pad_token_id", 0)
    spec = ModelSpec(options.pop("auto_class"), options, recipe.training.dropout, mixed_precision)
    training = recipe.training
    tokens = length or int(getattr(recipe.task, "max_length", DEFAULT_LENGTH))
    return Setting(
        method=method,
        task=task,
        training=training,
        spec=spec,
        config=spec_config(folder, spec),
        train=Shape(training.per_device_train_batch_size, tokens),
        evaluation=Shape(training.per_device_eval_batch_size, tokens),
        on_gpu=on_gpu,
    )


def train_shape(split: Split, training: TrainingConfig, *, seed: int, processes: int) -> Shape:
    """The largest micro-batch of the largest step that the first epoch takes."""
    size = training.per_device_train_batch_size
    batch = size * training.gradient_accumulation_steps * processes
    lengths = split.lengths
    steps = plan_epoch(lengths, batch, seed=seed, epoch=0)
    taken = math.ceil(training.num_train_epochs * len(steps))
    steps = steps[: min(taken, training.max_steps or taken)]
    step = steps[longest_step(steps, lengths)]
    shares = [m.indices for m in share_step(step, size, rank=0, processes=processes)]
    return _widest(shares, lengths)


def evaluation_shape(splits: Sequence[Split | None], size: int) -> Shape:
    """The largest batch of the splits that are scored."""
    firsts = [
        _widest(evaluation_batches(split.lengths, size)[:1], split.lengths)
        for split in splits
        if split
    ]
    return max(firsts, key=lambda shape: shape.examples * shape.tokens)


def build_method(recipe: Recipe) -> Method:
    """The method that the recipe's section configures."""
    method: Method = plugins.load("methods", recipe.resolved()["method"]["type"])(recipe.method)
    return method


def build_task(recipe: Recipe) -> Task:
    """The task that the recipe's section configures."""
    task: Task = plugins.load("tasks", recipe.resolved()["task"]["type"])(recipe.task)
    return task


def config_folder(base: BaseConfig) -> Path:
    """Where the base's config lies; a folder with nothing but config.json will do.

    Raises:
        SourceError: it cannot be found.
    """
    own = Path(base.name).expanduser()
    return own if (own / "config.json").is_file() else resolve_base(base).path


def _widest(batches: Sequence[Sequence[int]], lengths: Sequence[int]) -> Shape:
    shapes = []
    for batch in batches:
        own = [lengths[i] for i in batch]
        shapes.append(Shape(len(own), max(own), padded=min(own) < max(own)))
    return max(shapes, key=lambda shape: shape.examples * shape.tokens)


def _label_names(section: Any) -> list[str] | None:
    """As far as the recipe says; two where the data will."""
    if getattr(section, "problem", None) == "regression":
        return None
    return getattr(section, "labels", None) or ["0", "1"]


def _no_data(label_names: list[str] | None) -> TaskData:
    empty = Split("none", [], "")
    return TaskData(empty, None, empty, label_names, origin="none")
