"""Optimizers by name, weight decay where it belongs, and the learning rate of each step.

Called by the training loop.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from peftkit.contracts import ParameterGroup
from peftkit.training.config import TrainingConfig


def build_optimizer(config: TrainingConfig, groups: Sequence[ParameterGroup]) -> Optimizer:
    """The optimizer that the recipe names, over `groups`.

    Each group of PyTorch's gets `initial_lr`, which `set_learning_rates` scales.
    """
    settings: list[dict[str, Any]] = []
    for group in groups:
        for decays in (True, False):
            members = [p for p in group.parameters if (p.ndim >= 2) is decays]
            if members:
                rate = group.learning_rate
                decay = config.weight_decay if decays else 0.0
                settings.append(
                    {"params": members, "lr": rate, "initial_lr": rate, "weight_decay": decay}
                )
    return _construct(config, settings)


def _construct(config: TrainingConfig, settings: list[dict[str, Any]]) -> Optimizer:
    betas, epsilon = (config.adam_beta1, config.adam_beta2), config.adam_epsilon
    rate = config.learning_rate
    if config.optimizer == "adamw":
        return torch.optim.AdamW(settings, lr=rate, betas=betas, eps=epsilon, fused=True)
    if config.optimizer == "adam":
        return torch.optim.Adam(settings, lr=rate, betas=betas, eps=epsilon, fused=True)
    if config.optimizer == "adagrad":
        return torch.optim.Adagrad(settings, lr=rate)
    if config.optimizer == "sgd":
        return torch.optim.SGD(settings, lr=rate, momentum=config.momentum)
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(settings, lr=rate, momentum=config.momentum)
    return _bitsandbytes(config, settings)


def _bitsandbytes(config: TrainingConfig, settings: list[dict[str, Any]]) -> Optimizer:
    from bitsandbytes import optim

    classes = {
        "adamw_8bit": optim.AdamW8bit,
        "paged_adamw_8bit": optim.PagedAdamW8bit,
        "paged_adamw_32bit": optim.PagedAdamW32bit,
    }
    optimizer: Optimizer = classes[config.optimizer](
        settings,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )
    return optimizer


def learning_rate_factor(config: TrainingConfig, step: int, total_steps: int) -> float:
    """What the peak learning rate is multiplied by in optimizer step `step`, counted from 0.

    Warm-up reaches 1 at its last step; linear and cosine fall towards 0 after the last step.
    """
    warmup = config.warmup_steps
    # Less a little, because 0.07 * 100 is more than 7 in floating point.
    warmup = math.ceil(warmup * total_steps - 1e-9) if warmup < 1 else round(warmup)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    if config.lr_scheduler_type == "linear":
        return 1.0 - progress
    if config.lr_scheduler_type == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0


def set_learning_rates(optimizer: Optimizer, factor: float) -> None:
    """Give every group `factor` times its own peak rate, in place."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
