"""What a person wants to know of a budget: does it fit, how large a batch, what else would fit.

Called by the verb `plan`. Every figure is a prediction of its own, not a rule of thumb.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from peftkit import plugins
from peftkit.errors import MethodError
from peftkit.planning.budget import Budget, gib
from peftkit.planning.predict import Prediction, predict
from peftkit.planning.setting import Setting

QUALITY_ORDER = ("full", "lora", "qlora", "top_layers")
"""From the best score to be expected down; docs/RESULTS.md has what was measured here. Full and
LoRA are often not told apart."""
MAX_BATCH = 4096

_SHARED_KEYS = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_dora", "use_rslora")

Predict = Callable[[Setting], Prediction]


@dataclass(frozen=True)
class Option:
    """A change of the recipe, and the peak with it."""

    change: str
    """As overrides of the recipe, `training.gradient_checkpointing=true …`."""
    peak_bytes: int
    fits: bool


@dataclass(frozen=True)
class Answers:
    """For one recipe and one budget."""

    name: str
    method: str
    batch: int
    peak_bytes: int
    fits: bool
    largest_batch: int
    """Per device, at this length; 0 if not even one example fits."""
    methods: list[Option]
    """The four methods at the recipe's batch, the best score to be expected first."""
    ways: list[Option]
    """What would make it fit, if it does not; the first ones change no result."""
    budget: Budget

    @property
    def sentence(self) -> str:
        """What to do, in one sentence."""
        room = self.budget.usable_bytes
        free = self.budget.total_bytes - room
        where = f"{gib(self.budget.total_bytes)}" + (f", {gib(free)} of it kept free" * bool(free))
        needs = f"{self.name}: {self.method} with batch {self.batch} needs {gib(self.peak_bytes)}"
        if self.fits:
            spare = f"with {gib(room - self.peak_bytes)} to spare"
            more = self.largest_batch > self.batch
            return f"{needs} and fits in {where}, {spare}" + (
                f"; a batch of {self.largest_batch} would, too." if more else "."
            )
        others = [*self.ways, *(option for option in self.methods if option.fits)]
        if others:
            return (
                f"{needs}, over {where}; with {others[0].change} it needs "
                f"{gib(others[0].peak_bytes)} and fits."
            )
        return f"{needs}, over {where}; nothing that was tried fits: take a smaller base."


def answers(name: str, setting: Setting, budget: Budget, *, ask: Predict = predict) -> Answers:
    """All answers; `ask` predicts, perhaps for one of several processes."""
    own = setting.method_type
    found = ask(setting)
    peak, room = found.peak.total_bytes, budget.usable_bytes
    largest = largest_batch(setting, room, ask=ask)
    return Answers(
        name=name,
        method=own,
        batch=setting.train.examples,
        peak_bytes=peak,
        fits=peak <= room,
        largest_batch=largest,
        methods=[
            _option(f"method.type={kind}", changed, room, ask, known=found if kind == own else None)
            for kind, changed in _methods(setting, own)
        ],
        ways=[] if peak <= room else _ways(setting, room, largest, ask),
        budget=budget,
    )


def largest_batch(setting: Setting, room_bytes: int, *, ask: Predict = predict) -> int:
    """The most examples a device can train on at once, found on a line and then verified."""

    def needs(batch: int) -> int:
        return ask(setting.with_batch(batch)).training_bytes

    one, own = needs(1), setting.train.examples
    if one > room_bytes:
        return 0
    other = own if own > 1 and needs(own) <= room_bytes else 2
    fits, guess = 1, _on_line(one, (needs(other) - one) / (other - 1), room_bytes)
    too_large = guess + 1
    # A peak is the highest of several lines, so the first guess may be too large.
    while too_large - fits > max(1, fits // 50):
        if needs(guess) <= room_bytes:
            fits = guess
        else:
            too_large = guess
        guess = (fits + too_large) // 2
    return fits


def _on_line(one: int, slope: float, room_bytes: int) -> int:
    """The batch that fills the room if each further example takes `slope` bytes."""
    most = 1 + int((room_bytes - one) // slope) if slope > 0 else MAX_BATCH
    return max(1, min(most, MAX_BATCH))


def _methods(setting: Setting, own: str) -> Iterator[tuple[str, Setting]]:
    section = setting.method_section
    settings = {key: getattr(section, key) for key in _SHARED_KEYS if hasattr(section, key)}
    for kind in QUALITY_ORDER:
        if kind == own:
            yield kind, setting
            continue
        method = plugins.load("methods", kind)
        keys = settings if kind in ("lora", "qlora") else {}
        yield kind, replace(setting, method=method(method.Config(type=kind, **keys)))


def _option(
    change: str, setting: Setting, room: int, ask: Predict, *, known: Prediction | None = None
) -> Option:
    try:
        peak = (known or ask(setting)).peak.total_bytes
    except MethodError as error:
        return Option(f"{change} ({error.problems[0]})", -1, False)
    return Option(change, peak, peak <= room)


def _ways(setting: Setting, room: int, largest: int, ask: Predict) -> list[Option]:
    """Changes that make it fit, those that change no result first."""
    if ask(setting).phases["evaluation"].total_bytes > room:
        return _with_smaller_evaluation(setting, room, largest, ask)
    training, found = setting.training, list[Option]()
    checkpointed = replace(
        setting, training=training.model_copy(update={"gradient_checkpointing": True})
    )
    checkpointing = "training.gradient_checkpointing=true"
    if not training.gradient_checkpointing:
        found.append(_option(checkpointing, checkpointed, room, ask))
    if largest:
        found.append(_smaller(setting, largest, room, ask))
    if not any(option.fits for option in found):
        most = largest_batch(checkpointed, room, ask=ask)
        if most:
            smaller = _smaller(checkpointed, most, room, ask)
            found.append(replace(smaller, change=f"{checkpointing} {smaller.change}"))
    if training.optimizer == "adamw":
        eight = training.model_copy(update={"optimizer": "adamw_8bit"})
        changed = replace(setting, training=eight)
        found.append(_option("training.optimizer=adamw_8bit", changed, room, ask))
    return [option for option in found if option.fits]


def _with_smaller_evaluation(
    setting: Setting, room: int, largest: int, ask: Predict
) -> list[Option]:
    """As many examples at once as in training, and what else is needed with that."""
    batch = min(setting.train.examples, largest or 1)
    if batch >= setting.evaluation.examples:
        return []
    change = f"training.per_device_eval_batch_size={batch}"
    smaller = replace(setting, evaluation=replace(setting.evaluation, examples=batch))
    alone = _option(change, smaller, room, ask)
    if alone.fits:
        return [alone]
    more = _ways(smaller, room, largest, ask)
    return [replace(option, change=f"{change} {option.change}") for option in more]


def _smaller(setting: Setting, largest: int, room: int, ask: Predict) -> Option:
    """Fewer examples at once and as many more times, so that the effective batch stays."""
    before = setting.training
    batch = largest
    while before.per_device_train_batch_size % batch:
        batch -= 1
    steps = before.gradient_accumulation_steps * (before.per_device_train_batch_size // batch)
    change = (
        f"training.per_device_train_batch_size={batch} training.gradient_accumulation_steps={steps}"
    )
    training = before.model_copy(
        update={"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
    )
    return _option(change, replace(setting.with_batch(batch), training=training), room, ask)
