"""How many examples fit at once, and the cheapest change of a recipe's batches that makes it fit.

Called by the answers. Every figure is a prediction of its own; the lines only say which to make.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from peftkit.planning.predict import Prediction, predict
from peftkit.planning.setting import Setting

MAX_BATCH = 4096
"""Where the search for the largest batch ends."""

Predict = Callable[[Setting], Prediction]


@dataclass(frozen=True)
class Change:
    """A change of the training section that fits, and the peak with it."""

    overrides: list[str]
    """As `key=value` words of the command line."""
    batch: int
    """Examples per device."""
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    peak_bytes: int


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


def floor_bytes(found: Prediction) -> int:
    """What no batch and no recomputation changes: loading, and the optimizer's step."""
    phases = ("load", "optimizer_step")
    return max(found.phases[phase].total_bytes for phase in phases)


def cheapest_change(
    setting: Setting, found: Prediction, room_bytes: int, ask: Predict
) -> tuple[Change | None, int]:
    """The first that fits of smaller batches, and smaller batches with checkpointing.

    The effective batch stays as it is, and so do the results. `found` is the prediction as the
    setting stands. Returns the change, and the fewest bytes that the setting can do with so far
    as was tried.
    """
    least_bytes = floor_bytes(found)
    if least_bytes > room_bytes:
        return None, least_bytes
    guess = _guess(setting, found, room_bytes)
    if (peak := ask(guess).peak.total_bytes) <= room_bytes:
        return _change(setting, guess, peak), least_bytes
    for tried in _with_and_without_checkpointing(setting):
        least = ask(_with_batches(tried, 1, 1))
        least_bytes = least.peak.total_bytes
        if least_bytes <= room_bytes:
            most = found if tried is setting else ask(tried)
            changed = _largest_that_fits(tried, least, most, room_bytes, ask)
            return _change(setting, changed, ask(changed).peak.total_bytes), least_bytes
        if _without_activations(least) > room_bytes:
            break
    return None, least_bytes


def _guess(setting: Setting, found: Prediction, room_bytes: int) -> Setting:
    """As if all but what no batch changes grew with the examples; often it is so."""

    def most(examples: int, floor: int, peak: int) -> int:
        each = max(1, peak - floor) / examples
        return _divisor(examples, int((room_bytes - floor) // each))

    load, scored = (found.phases[phase].total_bytes for phase in ("load", "evaluation"))
    batch = most(setting.train.examples, floor_bytes(found), found.training_bytes)
    return _with_batches(setting, batch, most(setting.evaluation.examples, load, scored))


def _without_activations(found: Prediction) -> int:
    """What recomputation leaves at the least."""
    peaks = found.phases.values()
    return max(peak.total_bytes - peak.by_kind.get("activations", 0) for peak in peaks)


def with_8bit_optimizer(setting: Setting) -> Setting | None:
    """The same with AdamW's state in 8 bits, which changes results a little; None: no AdamW."""
    if setting.training.optimizer != "adamw":
        return None
    training = setting.training.model_copy(update={"optimizer": "adamw_8bit"})
    return replace(setting, training=training)


def changed_keys(before: Setting, after: Setting) -> list[str]:
    """What differs in the training section, as overrides."""
    then, now = before.training.model_dump(), after.training.model_dump()
    return [f"training.{key}={_word(now[key])}" for key in now if now[key] != then[key]]


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _with_and_without_checkpointing(setting: Setting) -> Iterator[Setting]:
    yield setting
    if not setting.training.gradient_checkpointing:
        training = setting.training.model_copy(update={"gradient_checkpointing": True})
        yield replace(setting, training=training)


def _with_batches(setting: Setting, examples: int, evaluated: int) -> Setting:
    """Fewer examples at once, and so many more times that the effective batch stays."""
    before = setting.training
    times = before.per_device_train_batch_size // examples
    sizes = {
        "per_device_train_batch_size": examples,
        "per_device_eval_batch_size": evaluated,
        "gradient_accumulation_steps": before.gradient_accumulation_steps * times,
    }
    return replace(
        setting.with_batch(examples),
        evaluation=replace(setting.evaluation, examples=evaluated),
        training=before.model_copy(update=sizes),
    )


def _largest_that_fits(
    setting: Setting, least: Prediction, most: Prediction, room_bytes: int, ask: Predict
) -> Setting:
    """Batches that divide the setting's; `least` is of one example at a time, and fits.

    A peak is the highest of several straight lines, so what lies under the line from `least` to
    `most` fits. Accumulation may add a constant, hence the loop.
    """

    def most_under(examples: int, low: int, high: int) -> int:
        slope = (high - low) / (examples - 1) if examples > 1 else 0
        return _divisor(examples, _on_line(low, slope, room_bytes))

    own, evaluated = setting.train.examples, setting.evaluation.examples
    batch = most_under(own, least.training_bytes, most.training_bytes)
    low, high = (found.phases["evaluation"].total_bytes for found in (least, most))
    size = most_under(evaluated, low, high)
    while ask(changed := _with_batches(setting, batch, size)).peak.total_bytes > room_bytes:
        batch, size = _divisor(own, batch - 1), _divisor(evaluated, size - 1)
    return changed


def _divisor(number: int, most: int) -> int:
    """The largest one up to `most`, and 1 at the least."""
    return next((d for d in range(min(number, most), 1, -1) if number % d == 0), 1)


def _change(before: Setting, after: Setting, peak_bytes: int) -> Change:
    training = after.training
    return Change(
        changed_keys(before, after),
        training.per_device_train_batch_size,
        training.gradient_accumulation_steps,
        training.gradient_checkpointing,
        peak_bytes,
    )
