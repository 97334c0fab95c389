"""A plan's end: one sentence that somebody can act on.

Called by the verb `plan`; words only, every figure is there already.
"""

from collections.abc import Sequence

from peftkit.planning.answers import QUALITY_ORDER, Answers, Choice, method_label
from peftkit.planning.budget import GIB, GPU_RESERVE_BYTES, GPUS, Budget, gib
from peftkit.planning.predict import Prediction
from peftkit.planning.setting import Setting


def sentence(said: Answers) -> str:
    """What to take, with how much to spare, and what would be better but needs more."""
    best, place = said.recommended, _place(said.budget)
    if best is None:
        advice = "take a smaller base, shorter examples or more memory."
        needs = _shortages(said.methods)
        return f"Nothing fits in {place}, however small the batch: {needs}; {advice}"
    spare = said.budget.usable_bytes - _peak(best)
    better = _shortages(said.methods[: said.methods.index(best)])
    fits = f"{best.label} with {_batch(best)} fits in {place} with {gib(spare)} to spare"
    return _capital(f"{fits}; {better}." if better else f"{fits}.")


def sentence_of_all(said: Sequence[Answers]) -> str:
    """Which of several recipes to take: the best that fits as it stands, or else with a change."""
    fitting = [each for each in said if each.fits]
    count = f"{len(fitting)} of these {len(said)} recipes" if fitting else "None of these recipes"
    fit = "fits as it stands" if len(fitting) < 2 else "fit as they stand"
    usable = fitting or [each for each in said if each.recommended] or said
    best = min(usable, key=_rank)
    if best.recommended is None:
        return f"{count} {fit}; {best.name}: {sentence(best)}"
    return f"{count} {fit}; the best score is to be expected of {best.name}: {sentence(best)}"


def sentence_without_budget(setting: Setting, found: Prediction) -> str:
    """What it needs, and the smallest GPU by name that has as much."""
    need, train = found.peak.total_bytes, setting.train
    what = f"{method_label(setting)} with batch {train.examples} needs {gib(need)}"
    by_size = sorted(GPUS, key=lambda name: GPUS[name])
    name = next((n for n in by_size if GPUS[n] * GIB >= need + GPU_RESERVE_BYTES), None)
    if name is None:
        most = f"{by_size[-1]} ({GPUS[by_size[-1]]} GiB)"
        return _capital(f"{what}, more than the largest GPU known here, {most}, has.")
    return _capital(f"{what}, which {name} ({GPUS[name]} GiB) and every larger GPU known here has.")


def sentence_of_all_without_budget(
    names: Sequence[str], settings: Sequence[Setting], found: Sequence[Prediction]
) -> str:
    """The recipe that needs the most."""
    most = max(range(len(found)), key=lambda index: found[index].peak.total_bytes)
    of_it = sentence_without_budget(settings[most], found[most])
    return f"Of these {len(found)} recipes {names[most]} needs the most: {of_it}"


def _place(budget: Budget) -> str:
    free = budget.total_bytes - budget.usable_bytes
    return gib(budget.total_bytes) + (f" ({gib(free)} of it kept free)" if free else "")


def _batch(choice: Choice) -> str:
    source = choice.change or choice
    steps = source.gradient_accumulation_steps
    words = f"batch {source.batch}" + (f" accumulated {steps} times" if steps > 1 else "")
    checkpointed = choice.change is not None and choice.change.gradient_checkpointing
    return words + (" and activation checkpointing" if checkpointed else "")


def _shortages(choices: Sequence[Choice]) -> str:
    return ", ".join(filter(None, map(_shortage, choices)))


def _shortage(choice: Choice) -> str | None:
    """What keeps a method from being the one to take; None: it cannot be planned."""
    if choice.peak_bytes is None:
        return None
    if choice.fits:
        return f"{choice.label} fits as well"
    if choice.change:
        less = f"{gib(_peak(choice))} with {_batch(choice)}"
        return f"{choice.label} needs {gib(choice.peak_bytes)}, or {less}"
    return f"{choice.label} needs at least {gib(choice.least_bytes or 0)}"


def _peak(choice: Choice) -> int:
    return choice.change.peak_bytes if choice.change else choice.peak_bytes or 0


def _rank(said: Answers) -> int:
    kind = said.recommended.method if said.recommended else said.method
    return QUALITY_ORDER.index(kind) if kind in QUALITY_ORDER else len(QUALITY_ORDER)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
