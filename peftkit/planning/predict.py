"""Peak memory of a recipe before anything of it is loaded.

Called by the experiment, whose record keeps the prediction, and by the answers of `plan`. Builds
the method's model on fake tensors, from the base's config alone, and steps it under a tape.
"""

import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.optim import Optimizer
from transformers import PretrainedConfig, PreTrainedModel

from peftkit.contracts import ParameterGroup
from peftkit.errors import MethodError, UsageError
from peftkit.memory.fake_step import Batch, FakeJob, trace
from peftkit.memory.gpu_kernels import CUBLAS_WORKSPACES_BYTES, gpu_kernels
from peftkit.memory.known_values import OneEndTokenARow
from peftkit.memory.storage_tape import Peak, largest
from peftkit.modeling.fake_loading import FakeMemory, fake_model, quantisation_constants
from peftkit.modeling.loading import QuietLoading, held_dtype
from peftkit.modeling.parameters import (
    checkpoint_activations,
    position_limit,
    set_precision,
    train_mode,
    transformer_blocks,
)
from peftkit.planning.setting import Setting, Shape
from peftkit.training.config import TrainingConfig
from peftkit.training.optimizers import build_optimizer

TRACED_DEPTH = 12
"""Blocks up to which a model is stepped whole; of a deeper one two short versions are, and each
phase's peak is carried on as a straight line: every further block adds the same."""

_PARTS = {
    "load": ("load",),
    "forward": ("forward",),
    "backward": ("backward_first", "backward_middle", "backward_last"),
    "optimizer_step": ("optimizer_step",),
    "evaluation": ("evaluation",),
}


@dataclass(frozen=True)
class Prediction:
    """Peaks of live tensors by phase: load, forward, backward, optimizer_step, evaluation."""

    phases: Mapping[str, Peak]
    block_bytes: int
    """Weights of the largest block, as held."""
    on_gpu: bool = False

    @property
    def peak(self) -> Peak:
        """The highest of all phases."""
        return largest(self.phases.values())

    @property
    def training_bytes(self) -> int:
        """The highest without evaluation, whose batches have a size of their own."""
        return largest(p for name, p in self.phases.items() if name != "evaluation").total_bytes

    def by_record_phase(self) -> dict[str, int]:
        """Bytes under the names of a run record: load, train_step and eval.

        As the meter counts them: on a CPU evaluation leaves out the optimizer's state.
        """
        step = largest(self.phases[p] for p in ("forward", "backward", "optimizer_step"))
        evaluation = self.phases["evaluation"]
        unseen = 0 if self.on_gpu else evaluation.by_kind.get("optimizer_state", 0)
        return {
            "load": self.phases["load"].total_bytes,
            "train_step": step.total_bytes,
            "eval": evaluation.total_bytes - unseen,
        }


def predict(setting: Setting) -> Prediction:
    """Peaks of the run, from shapes alone.

    Raises:
        MethodError: the method does not fit the model.
        SourceError: the model cannot be built.
        UsageError: examples are longer than its positions reach.
    """
    depth = int(setting.config.get_text_config().num_hidden_layers)
    # The first block, the last two, and those that the method treats in a way of their own.
    short = getattr(setting.method_section, "num_layers", 0) + 3
    if depth <= max(TRACED_DEPTH, short + 1) or not _is_uniform(setting.config):
        parts, block = _traced(setting)
    else:
        low, block = _traced(_of_depth(setting, short))
        high, _ = _traced(_of_depth(setting, short + 1))
        parts = {part: _line(low[part], high[part], depth - short) for part in low}
    phases = _joined(parts)
    if setting.on_gpu:
        phases = {n: p if n == "load" else _with_workspaces(p) for n, p in phases.items()}
    return Prediction(phases, block, setting.on_gpu)


def _with_workspaces(peak: Peak) -> Peak:
    """The allocator counts them as it counts tensors."""
    kinds = {**peak.by_kind}
    kinds["temporary"] = kinds.get("temporary", 0) + CUBLAS_WORKSPACES_BYTES
    return Peak(peak.total_bytes + CUBLAS_WORKSPACES_BYTES, kinds)


def _is_uniform(config: PretrainedConfig) -> bool:
    """Whether all blocks are of one kind, so that a few stand for all."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    is_one_stack = not getattr(config, "is_encoder_decoder", False)
    return is_one_stack and text is config and (kinds is None or len(set(kinds)) == 1)


def _of_depth(setting: Setting, depth: int) -> Setting:
    config = deepcopy(setting.config)
    config.num_hidden_layers = depth
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:depth]
    return replace(setting, config=config)


def _line(low: Peak, high: Peak, steps: int) -> Peak:
    kinds = {**low.by_kind, **high.by_kind}
    grown = {
        kind: low.by_kind.get(kind, 0)
        + steps * (high.by_kind.get(kind, 0) - low.by_kind.get(kind, 0))
        for kind in kinds
    }
    return Peak(low.total_bytes + steps * (high.total_bytes - low.total_bytes), grown)


def _joined(parts: Mapping[str, Peak]) -> dict[str, Peak]:
    return {
        phase: largest(parts[name] for name in names if name in parts)
        for phase, names in _PARTS.items()
    }


def _traced(setting: Setting) -> tuple[dict[str, Peak], int]:
    """Peaks of the parts of one step, and the bytes of the largest block."""
    mode, options = FakeMemory(), setting.method.load_options()
    with warnings.catch_warnings(), QuietLoading():
        # PEFT copies heads and asks whether their memory is there.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        model = fake_model(setting.config, setting.spec, options, mode)
        _check_length(setting, position_limit(model))
        kernels = partial(gpu_kernels, setting.spec.mixed_precision, active=setting.on_gpu)
        with mode, OneEndTokenARow(), kernels():
            blocks = _blocks(model)
            prepared = setting.method.prepare(model)
            set_precision(prepared, held_dtype(setting.spec, options))
            if setting.training.gradient_checkpointing:
                # A function mode is off in the backward pass, which it handles as a whole.
                checkpoint_activations(model, preserve_rng_state=False, recompute_in=kernels)
            train_mode(prepared)
            job = _job(setting, prepared, blocks)
            constants = list(quantisation_constants(prepared))
            parts = trace(job, quantisation=constants, on_gpu=setting.on_gpu)
            sizes = [sum(p.nbytes for p in block.parameters()) for block in blocks]
    return parts, max(sizes, default=0)


def _check_length(setting: Setting, limit: int | None) -> None:
    tokens = max(setting.train.tokens, setting.evaluation.tokens)
    if limit is not None and tokens > limit:
        raise UsageError(
            f"{tokens} tokens an example: a base of type '{setting.config.model_type}' has "
            f"positions for {limit}; take a smaller --length or task.max_length"
        )


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    try:
        return list(transformer_blocks(model))
    except MethodError:  # an encoder and a decoder
        return []


def _job(setting: Setting, model: nn.Module, blocks: list[nn.Module]) -> FakeJob:
    training = setting.training
    groups = setting.method.parameter_groups(model, training.learning_rate)
    micro_batches = min(training.gradient_accumulation_steps, 2)

    def loss(outputs: Any, labels: Tensor) -> Tensor:
        return setting.task.loss(outputs, labels, label_smoothing=training.label_smoothing)

    return FakeJob(
        model=model,
        optimizer=_optimizer(training, groups),
        loss=loss,
        batches=[_batch(setting, setting.train) for _ in range(micro_batches)],
        eval_batch=_batch(setting, setting.evaluation),
        blocks=blocks,
        mixed_precision=setting.spec.mixed_precision,
        max_grad_norm=training.max_grad_norm,
    )


def _optimizer(training: TrainingConfig, groups: list[ParameterGroup]) -> Optimizer:
    # bitsandbytes makes tables whose numbers it reads; state comes with the first step.
    with unset_fake_temporarily():
        return build_optimizer(training, groups)


def _batch(setting: Setting, shape: Shape) -> Batch:
    size = (shape.examples, shape.tokens)
    kind = setting.task.label_kind
    dtype = torch.float32 if kind == "number" else torch.int64
    batch = {
        "input_ids": torch.zeros(size, dtype=torch.int64),
        "labels": torch.zeros(size if kind == "tokens" else size[:1], dtype=dtype),
    }
    # A mask of ones is looked at and dropped; a fake one cannot be looked at.
    return batch | ({"attention_mask": torch.ones(size, dtype=torch.int64)} if shape.padded else {})
