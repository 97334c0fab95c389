"""The `training` section of a recipe.

Read by the recipe and the loop; imports nothing heavy.
"""

from typing import Literal

from pydantic import Field

from peftkit.schema import Section

OptimizerName = Literal[
    "adamw",
    "adam",
    "adagrad",
    "sgd",
    "rmsprop",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
]
TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class TrainingConfig(Section):
    """How to train; names are those of `transformers.TrainingArguments` where it has one."""

    learning_rate: float = Field(gt=0.0)
    learning_rates_tried: list[float] = []
    """The rates that were compared on the held-out part of train before this one was chosen."""
    num_train_epochs: float = Field(default=3.0, gt=0.0)
    max_steps: int | None = Field(default=None, gt=0)
    """Optimizer steps after which to stop, if `num_train_epochs` would take more."""
    per_device_train_batch_size: int = Field(default=32, gt=0)
    per_device_eval_batch_size: int = Field(default=64, gt=0)
    gradient_accumulation_steps: int = Field(default=1, gt=0)
    auto_batch_size: bool = False
    """Whether to halve the train batch, and double the accumulation, until it fits in memory."""
    optimizer: OptimizerName = "adamw"
    adam_beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    adam_beta2: float = Field(default=0.999, ge=0.0, lt=1.0)
    adam_epsilon: float = Field(default=1e-8, gt=0.0)
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    """For `sgd` and `rmsprop`."""
    weight_decay: float = Field(default=0.01, ge=0.0)
    """L2; not applied to biases and norms (parameters of fewer than two dimensions)."""
    l1: float = Field(default=0.0, ge=0.0)
    """Weight of the sum of absolute values of the trained matrices, added to the loss."""
    max_grad_norm: float | None = Field(default=1.0, gt=0.0)
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    dropout: float | None = Field(default=None, ge=0.0, lt=1.0)
    """Overrides every dropout probability of the base's config; None leaves them."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: float = Field(default=0.06, ge=0.0)
    """Optimizer steps of linear warm-up; below 1, a fraction of all steps."""
    metric_for_best_model: str | None = None
    """Metric on the held-out part of train that picks the checkpoint to keep; None is the task's
    leading metric. `loss` is allowed."""
    greater_is_better: bool | None = None
    """Of that metric; None is right for `loss` and the metrics that peftkit has itself, any other
    must say it."""
    early_stopping_patience: int | None = Field(default=None, gt=0)
    """Evaluations without improvement after which to stop; None never stops early."""
    eval_steps: int | None = Field(default=None, gt=0)
    """Optimizer steps between evaluations on the held-out part; None is once an epoch."""
    save_steps: int | None = Field(default=None, gt=0)
    """Optimizer steps between checkpoints for `--resume`; None is once an epoch."""
    save_total_limit: int = Field(default=2, gt=0)
    """Newest checkpoints to keep while the run goes on; the best one is kept besides."""
    logging_steps: int = Field(default=50, gt=0)
    report_to: list[TrackerName] = []
    """Trackers that get what `log.jsonl` gets; each needs its package."""
    gradient_checkpointing: bool = False
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """None is what `accelerate launch` or its config file says."""
    dataloader_num_workers: int = Field(default=0, ge=0)
