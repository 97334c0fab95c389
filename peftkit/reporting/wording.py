"""A table in plain sentences: what can be told apart, what is cheapest, how sure that is.

Called by the documents and the command line; imports the results.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from peftkit.reporting.conditions import is_sample
from peftkit.reporting.figure_text import interval, listed, mib, plural, probability, score, words
from peftkit.reporting.statistics import LEVEL
from peftkit.reporting.tables import BESIDE, best_by_memory

if TYPE_CHECKING:
    from peftkit.reporting.conditions import Difference
    from peftkit.reporting.pairs import Pair
    from peftkit.reporting.results import Row, Table


@dataclass(frozen=True)
class ConditionGroup:
    """Conditions in which the same arms differ from the same others."""

    arms: list[str]
    """Who, in words: a column each."""
    rows: list[tuple[str, str, list[str]]]
    """Letter, condition, and its value in each column."""


def sample_sentence(rows: Sequence["Row"]) -> str:
    """Which rows are no real data, by name if others are; empty if all are real."""
    told = [
        (row.label, {is_sample(run.record) for run in row.arm.runs if run.record}) for row in rows
    ]
    samples = [label for label, found in told if True in found]
    if not samples:
        return ""
    are_all = not any(False in found for _, found in told)
    return (
        f"Sample data: {'these runs' if are_all else listed(samples)} used a small stand-in that "
        "peftkit made itself. Memory and time are measured; the scores say nothing about the real "
        "data set."
    )


def beside_sentence(table: "Table") -> str:
    """Why some wall seconds are not to be trusted; empty if nothing speaks against them."""
    figures = [row.figures for row in table.rows]
    beside = sum(f.runs_beside_another for f in figures)
    if not beside:
        return ""
    rows = [row.label for row in table.rows if row.figures.runs_beside_another]
    has_steadier = any(f.train_cpu_seconds for f in figures)
    steadier = " Processor seconds suffer less." if has_steadier else ""
    return (
        f"{BESIDE} During {plural(beside, 'run')} of {listed(rows)} another run was at work on the "
        "same machine: their wall seconds, and what is made of them (throughput, cost), are not "
        f"those of a run on its own.{steadier}"
    )


def summary_sentences(table: "Table") -> list[str]:
    """In the order in which they should be read; a sample says so first."""
    sentences = [sample] if (sample := sample_sentence(table.rows)) else []
    tested = [row for row in table.rows if row.interval is not None]
    if not tested:
        return [*sentences, *_untested(table), *_unfinished(table)]
    sentences += [_verdict(table, tested), *_cheapest(tested), *_resident_order(table)]
    sentences += [*_certainty(table), *_partly_tested(tested), *_one_seed(tested)]
    return [*sentences, *_unfinished(table)]


def condition_groups(table: "Table") -> list[ConditionGroup]:
    """Conditions that part the rows in one way, together."""
    grouped: dict[tuple[frozenset[str], ...], list[Difference]] = {}
    for condition in table.conditions:
        parts = sorted(map(frozenset, condition.values.values()), key=sorted)
        grouped.setdefault(tuple(parts), []).append(condition)
    return [_group(table, parts, members) for parts, members in grouped.items()]


def _group(
    table: "Table", parts: tuple[frozenset[str], ...], members: "list[Difference]"
) -> ConditionGroup:
    order = {row.label: place for place, row in enumerate(table.rows)}
    ordered = sorted(parts, key=lambda part: (-len(part), min(order[label] for label in part)))
    rows = []
    for condition in members:
        value_of = {frozenset(labels): value for value, labels in condition.values.items()}
        rows.append((condition.letter, condition.condition, [value_of[p] for p in ordered]))
    names = [listed(sorted(part, key=order.__getitem__)) for part in ordered]
    return ConditionGroup(names, rows)


def condition_sentence(values: dict[str, list[str]], arms: int) -> str:
    """`3 for a and b; 1 for c`; the most common value of many arms without their names."""
    parts = []
    for place, (value, labels) in enumerate(values.items()):
        is_most = place == 0 and 2 * len(labels) > arms and len(labels) > 2
        most = "all" if len(labels) == arms else "most"
        parts.append(f"{value} for {most if is_most else listed(labels)}")
    return "; ".join(parts)


def pairs_with_best(table: "Table") -> dict[str, "Pair"]:
    """Label of each other tested arm → its test against the arm with the best score."""
    best = next((row.label for row in table.rows if row.interval is not None), "")
    return {pair.b if pair.a == best else pair.a: pair for pair in table.pairs.of(best)}


def _verdict(table: "Table", tested: list["Row"]) -> str:
    best = tested[0]
    shown = f"{best.label} has the best mean {words(table.metric)}, {score(best.score)}"
    if len(tested) == 1:
        return (
            f"{shown} (95% interval {interval(best.interval)}); there is nothing to compare it to."
        )
    against = pairs_with_best(table)
    group = {row.label for row in tested if row.in_best_group}
    behind = {row.label: against[row.label] for row in tested if row.label not in group}
    contrary = {label: p for label, p in against.items() if label in group and p.is_separated}
    level = [row.label for row in tested[1:] if row.label in group and row.label not in contrary]
    told = _told(behind, level, len(tested))
    if contrary:
        told += f". By the tested seeds alone {_behind(contrary)} would be ahead of it"
    return f"{shown}{told}."


def _told(behind: "dict[str, Pair]", level: list[str], count: int) -> str:
    """Of the best of `count` rows: what it is ahead of, and what cannot be told apart from it."""
    if behind:
        apart = f" and cannot be told apart from {listed(level)}" if level else ""
        return f": {_ahead(behind)}{apart}"
    if len(level) == 1:
        return f", but {level[0]} cannot be told apart from it"
    if len(level) == count - 1:
        return f", but none of the other {len(level)} can be told apart from it"
    return f", but {listed(level)} cannot be told apart from it" if level else ""


def _ahead(against: "dict[str, Pair]") -> str:
    """What the best is ahead of; a pair with one seed speaks of trained models, not of methods."""
    methods = {label: pair for label, pair in against.items() if pair.covers_seeds}
    models = {label: pair for label, pair in against.items() if not pair.covers_seeds}
    parts = []
    if methods:
        parts.append(f"it is ahead of {_behind(methods)}")
    if models:
        parts.append(f"these trained models are ahead of those of {_behind(models)}")
    return "; ".join(parts)


def _behind(pairs: "dict[str, Pair]") -> str:
    worst = max(pair.p_adjusted for pair in pairs.values())
    return f"{listed(list(pairs))} (adjusted p at most {probability(worst)})"


def _cheapest(tested: list["Row"]) -> list[str]:
    """The method to take if memory is short, among those that no test puts behind the best."""
    group = [row for row in tested if row.in_best_group and row.figures.needed_bytes]
    if not group:
        return []
    cheap = min(group, key=lambda row: row.figures.needed_bytes or 0)
    peak = f"{mib(cheap.figures.needed_bytes)} MiB of live tensors at the peak"
    if len(group) == 1:
        return [f"{cheap.label} holds {peak}."]
    best = group[0]
    if cheap is best:
        return [f"It is also the cheapest in memory of them: {peak}."]
    than = f", against {mib(best.figures.needed_bytes)} MiB for {best.label}"
    return [f"The cheapest in memory of these is {cheap.label}: {peak}{than}."]


def _resident_order(table: "Table") -> list[str]:
    """Where the whole process says otherwise of who needs less memory than live tensors do."""
    front = {row.label for row in best_by_memory(table)}
    rows = [row for row in table.rows if row.label in front or row.in_best_group]
    found = [(f.needed_bytes, f.resident_bytes, row.label) for row in rows if (f := row.figures)]
    sizes = [(live, resident, label) for live, resident, label in found if live and resident]
    by_live = [resident for _, resident, _ in sorted(sizes)]
    # Beside a GPU's memory, that of the host is another matter and no other order of the same.
    is_of_host = any(row.figures.memory["train_step"]["reserved_bytes"] for row in rows)
    if is_of_host or by_live == sorted(by_live):
        return []
    shown = [
        f"{label} {mib(size)} MiB" for size, label in sorted((s, label) for _, s, label in sizes)
    ]
    return [f"By the resident memory of the whole process the order is another: {listed(shown)}."]


def _certainty(table: "Table") -> list[str]:
    sizes = table.pairs.detectable()
    if sizes is None:
        return []
    low, high = sizes
    size = f"{low:.3f}" if high - low < 0.0005 else f"{low:.3f} to {high:.3f} (by pair)"
    examples = plural(table.examples, "validation example")
    if table.pairs.cover_seeds:
        given, beyond = f"How sure: with these seeds and {examples}", _beside_one_seed(table)
    else:
        given = f"How sure, of these trained models only: with {examples}"
        beyond = " With one seed, how much another seed would change is not known."
    return [
        f"{given}, a true difference in {words(table.metric)} of {size} would be found 4 times in "
        "5. A smaller one would mostly be missed, so not told apart does not mean equal."
        f"{beyond}{_nearest(table)}"
    ]


def _beside_one_seed(table: "Table") -> str:
    """Whose tests the detectable differences leave out."""
    alone = [row.label for row in table.rows if row.is_of_one_seed]
    if not alone:
        return ""
    return f" Tests with {listed(alone)} are not in this: they speak of these trained models only."


def _nearest(table: "Table") -> str:
    """The clearest of the differences from the best that are not clear enough."""
    against = pairs_with_best(table)
    open_pairs = [(p.p_adjusted, p.p, label) for label, p in against.items()]
    unclear = [entry for entry in open_pairs if entry[0] >= LEVEL]
    if not unclear:
        return ""
    adjusted, _, label = min(unclear)
    only = "" if against[label].covers_seeds else ", these trained models only"
    shown = f"{label}, adjusted p {probability(adjusted)}{only}"
    return f" Clearest among those not told apart from the best: {shown}."


def _partly_tested(tested: list["Row"]) -> list[str]:
    """Rows whose tests speak of fewer runs than their score."""
    parts = [
        f"{row.label}: tests over {len(row.tested_seeds)} of {len(row.scores)} seeds "
        f"(their mean is {score(fmean(row.scores[seed] for seed in row.tested_seeds))})"
        for row in tested
        if row.is_partly_tested
    ]
    return [f"The predictions of some runs cannot be used. {listed(parts)}."] if parts else []


def _one_seed(tested: list["Row"]) -> list[str]:
    alone = [row.label for row in tested if row.is_of_one_seed]
    if not alone:
        return []
    return [
        f"One seed only for {listed(alone)}: no interval over seeds, and tests with it speak of "
        "the trained models at hand, not of what another seed would give."
    ]


def _untested(table: "Table") -> list[str]:
    scored = [row for row in table.rows if row.score is not None]
    if not scored:
        return ["No run was completed, so there is no score."]
    best = scored[0]
    return [
        f"{best.label} has the best mean {words(table.metric)}, {score(best.score)}; without "
        "per-example predictions that can be used, nothing is tested."
    ]


def _unfinished(table: "Table") -> list[str]:
    """Which arms lack scores of some seeds, in the words of their status."""
    found = []
    for row in table.rows:
        bad = {s: n for s, n in row.figures.statuses.items() if s != "completed"}
        if bad:
            words = ", ".join(f"{n} {status.replace('_', ' ')}" for status, n in bad.items())
            found.append(f"{row.label} ({words})")
    return [f"Not completed: {listed(found)}."] if found else []
