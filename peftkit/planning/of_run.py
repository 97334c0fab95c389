"""The prediction that a run's record keeps, made from the data that it will train on.

Called by the experiment before the base is loaded, so that a run which then has no memory has one,
too.
"""

from accelerate import Accelerator
from accelerate.utils import DistributedType

from peftkit.contracts import TaskData
from peftkit.modeling.loading import ModelSpec, spec_config
from peftkit.planning.predict import predict
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


def foresee(
    recipe: Recipe, data: TaskData, spec: ModelSpec, accelerator: Accelerator
) -> dict[str, int] | None:
    """Peak of live tensors in bytes by phase of the record; None if it cannot be said."""
    try:
        found = predict(_setting(recipe, data, spec, accelerator))
        processes = accelerator.num_processes
        how: Sharding = "fsdp" if accelerator.distributed_type == DistributedType.FSDP else "ddp"
        return sharded(found, how, processes).by_record_phase()
    except Exception:  # whatever a third party's method does on fake tensors: the run goes on
        return None


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
        regression=data.label_names is None,
        on_gpu=accelerator.device.type == "cuda",
    )
