"""The prediction that a run's record keeps, made from the data that it will train on.

Called by the experiment before the base is loaded, so that a run which then has no memory has one,
too; and after that, for the batch that would have fitted.
"""

import os
from dataclasses import replace

import torch
from accelerate import Accelerator

from peftkit.contracts import TaskData
from peftkit.modeling.loading import ModelSpec, spec_config
from peftkit.planning.budget import Budget
from peftkit.planning.predict import Prediction, predict
from peftkit.planning.setting import (
    Setting,
    build_method,
    build_task,
    config_folder,
    evaluation_shape,
    train_shape,
)
from peftkit.planning.sharding import Sharding, sharded
from peftkit.recipe import Recipe
from peftkit.training.batch_size import accumulation_steps
from peftkit.training.sharded import is_fsdp
from peftkit.training.zero import stage_asked


def foresee(
    recipe: Recipe, data: TaskData, spec: ModelSpec, accelerator: Accelerator
) -> dict[str, int] | None:
    """Peak of live tensors in bytes by phase of the record; None if it cannot be said."""
    try:
        return _predicted(_setting(recipe, data, spec, accelerator), accelerator).by_record_phase()
    except Exception:  # whatever a third party's method does on fake tensors: the run goes on
        return None


def fitting_batch(
    recipe: Recipe, data: TaskData, spec: ModelSpec, accelerator: Accelerator, size: int
) -> int | None:
    """`size` examples at a time, or halved until training should fit this device; None: unknown."""
    try:
        setting, room = _setting(recipe, data, spec, accelerator), _room_bytes(accelerator.device)
        while _training_bytes(setting, size, accelerator) > room:
            if size % 2:
                return None
            size //= 2
    except Exception:  # as above: this is advice for a run that has failed already
        return None
    return size


def _predicted(setting: Setting, accelerator: Accelerator) -> Prediction:
    """Peaks of one process."""
    return sharded(predict(setting), _sharding(accelerator), accelerator.num_processes)


def _sharding(accelerator: Accelerator) -> Sharding:
    if is_fsdp(accelerator):
        return "fsdp"
    stages: dict[int | None, Sharding] = {1: "zero2", 2: "zero2", 3: "zero3"}
    return stages.get(stage_asked(accelerator), "ddp")


def _training_bytes(setting: Setting, size: int, accelerator: Accelerator) -> int:
    steps = accumulation_steps(setting.training, size)
    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
    training = setting.training.model_copy(update=sizes)
    halved = replace(setting.with_batch(size), training=training)
    return _predicted(halved, accelerator).training_bytes


def _room_bytes(device: torch.device) -> int:
    """What tensors may take of a GPU, or of the machine's memory."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return Budget("device", total, on_gpu=True).usable_bytes
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _setting(recipe: Recipe, data: TaskData, spec: ModelSpec, accelerator: Accelerator) -> Setting:
    training, processes = recipe.training, accelerator.num_processes
    size = training.per_device_eval_batch_size
    return Setting(
        method=build_method(recipe),
        task=build_task(recipe),
        training=training,
        spec=spec,
        config=spec_config(config_folder(recipe.base), spec),
        train=train_shape(data.train, training, seed=recipe.seed, processes=processes),
        evaluation=evaluation_shape([data.holdout, data.validation], size),
        on_gpu=accelerator.device.type == "cuda",
    )
