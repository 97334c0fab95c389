"""What a person wants to know of a budget: does it fit, how large a batch, what else would fit.

Called by the verb `plan`. Every figure is a prediction of its own, not a rule of thumb.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import yaml

from peftkit import plugins
from peftkit.errors import MethodError
from peftkit.planning.budget import Budget
from peftkit.planning.fitting import (
    Change,
    Predict,
    changed_keys,
    cheapest_change,
    floor_bytes,
    largest_batch,
    with_8bit_optimizer,
)
from peftkit.planning.predict import predict
from peftkit.planning.setting import Setting

QUALITY_ORDER = ("full", "lora", "qlora", "top_layers")
"""From the best score to be expected down; docs/RESULTS.md has what was measured here. Full and
LoRA are often not told apart."""

_NAMES = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "qlora": "QLoRA",
    "top_layers": "top-layer freezing",
}
_SHARED_KEYS = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_dora", "use_rslora")


@dataclass(frozen=True)
class Choice:
    """One method on the recipe's base and task."""

    method: str
    label: str
    """For people: `LoRA r=8`."""
    overrides: list[str]
    """What makes the recipe one of this method; nothing for its own."""
    batch: int
    """Per device, as the recipe has it."""
    gradient_accumulation_steps: int
    peak_bytes: int | None
    """As the recipe stands; None: it cannot be planned."""
    fits: bool = False
    change: Change | None = None
    """Where it does not fit: the cheapest change found that makes it fit."""
    least_bytes: int | None = None
    """Where nothing was found: it needs this much or more."""
    reason: str | None = None
    """Why it cannot be planned."""

    @property
    def can_fit(self) -> bool:
        """As the recipe stands or changed."""
        return self.fits or self.change is not None

    @property
    def advice(self) -> list[str]:
        """All that is to be added to the recipe's command line."""
        return [*self.overrides, *(self.change.overrides if self.change else [])]


@dataclass(frozen=True)
class Answers:
    """For one recipe and one budget."""

    name: str
    method: str
    batch: int
    peak_bytes: int
    fits: bool
    largest_batch: int
    """Per device, at this length; 0 if not even one example fits, `MAX_BATCH` is where it ends."""
    methods: list[Choice]
    """The best score to be expected first; a method that is none of the four stands before them."""
    budget: Budget

    @property
    def recommended(self) -> Choice | None:
        """The recipe's own method if it can fit, or else the best that can."""
        able = [choice for choice in self.methods if choice.can_fit]
        own = (choice for choice in able if choice.method == self.method)
        return next(own, able[0] if able else None)


def answers(name: str, setting: Setting, budget: Budget, *, ask: Predict = predict) -> Answers:
    """All answers; `ask` predicts, perhaps for one of several processes."""
    found, room = ask(setting), budget.usable_bytes
    peak = found.peak.total_bytes
    return Answers(
        name=name,
        method=setting.method_type,
        batch=setting.train.examples,
        peak_bytes=peak,
        fits=peak <= room,
        largest_batch=largest_batch(setting, room, ask=ask) if floor_bytes(found) <= room else 0,
        methods=[_choice(words, each, room, ask) for words, each in _methods(setting)],
        budget=budget,
    )


def method_label(setting: Setting) -> str:
    """`LoRA r=8`, `full fine-tuning`; a plugin's method is called by its type."""
    rank = getattr(setting.method_section, "r", None)
    name = _NAMES.get(setting.method_type, setting.method_type)
    return name if rank is None else f"{name} r={rank}"


def _methods(setting: Setting) -> Iterator[tuple[list[str], Setting]]:
    """The method's overrides, and the recipe with it."""
    own = setting.method_type
    if own not in QUALITY_ORDER:
        yield [], setting
    section = setting.method_section
    settings = {key: getattr(section, key) for key in _SHARED_KEYS if hasattr(section, key)}
    for kind in QUALITY_ORDER:
        if kind == own:
            yield [], setting
            continue
        method = plugins.load("methods", kind)
        config = method.Config(type=kind, **(settings if kind in ("lora", "qlora") else {}))
        yield [_override(config)], replace(setting, method=method(config))


def _override(config: Any) -> str:
    """The whole section: keys of another method beside a new `type` would be refused."""
    content = {"type": config.type, **config.model_dump(exclude_defaults=True)}
    words = yaml.safe_dump(content, default_flow_style=True, sort_keys=False, width=10**6)
    return f"method={words.strip()}"


def _choice(words: list[str], setting: Setting, room: int, ask: Predict) -> Choice:
    training = setting.training
    bare = Choice(
        method=setting.method_type,
        label=method_label(setting),
        overrides=words,
        batch=setting.train.examples,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        peak_bytes=None,
    )
    try:
        found = ask(setting)
    except MethodError as error:
        return replace(bare, reason=error.problems[0])
    planned = replace(bare, peak_bytes=found.peak.total_bytes)
    if found.peak.total_bytes <= room:
        return replace(planned, fits=True)
    change, least = cheapest_change(setting, found, room, ask)
    if change is None and not words:  # of the recipe's own method
        change = _change_with_8bit_optimizer(setting, room, ask)
    return replace(planned, change=change, least_bytes=None if change else least)


def _change_with_8bit_optimizer(setting: Setting, room: int, ask: Predict) -> Change | None:
    smaller = with_8bit_optimizer(setting)
    if smaller is None or ask(setting).phases["load"].total_bytes > room:
        return None
    found, optimizer = ask(smaller), changed_keys(setting, smaller)
    if found.peak.total_bytes <= room:
        training = setting.training
        return Change(
            optimizer,
            setting.train.examples,
            training.gradient_accumulation_steps,
            training.gradient_checkpointing,
            found.peak.total_bytes,
        )
    change, _ = cheapest_change(smaller, found, room, ask)
    return replace(change, overrides=optimizer + change.overrides) if change else None
