"""A table in plain sentences: what can be told apart, what is cheapest, how sure that is.

Called by the documents and the command line; imports the results.
"""

from typing import TYPE_CHECKING

from peftkit.reporting.figure_text import interval, listed, mib, plural, probability, score

if TYPE_CHECKING:
    from peftkit.reporting.results import Pair, Row, Table

SAMPLE_SENTENCE = (
    "Sample data: these runs used a small stand-in that peftkit made itself. Memory and time are "
    "measured; the scores say nothing about the real data set."
)


def summary_sentences(table: "Table") -> list[str]:
    """In the order in which they should be read; a sample says so first."""
    sentences = [SAMPLE_SENTENCE] if table.is_sample else []
    tested = [row for row in table.rows if row.interval is not None]
    if not tested:
        return [*sentences, *_untested(table), *_unfinished(table)]
    sentences += [_verdict(table, tested), *_cheapest(tested)]
    return [*sentences, *_certainty(table), *_one_seed(tested), *_unfinished(table)]


def condition_sentence(values: dict[str, list[str]], arms: int) -> str:
    """`3 for a and b; 1 for c`; the most common value of many arms without their names."""
    parts = []
    for place, (value, labels) in enumerate(values.items()):
        is_most = place == 0 and 2 * len(labels) > arms and len(labels) > 2
        parts.append(f"{value} for {'most' if is_most else listed(labels)}")
    return "; ".join(parts)


def pairs_with_best(table: "Table") -> dict[str, "Pair"]:
    """Label of each other tested arm → its test against the arm with the best score."""
    best = next((row.label for row in table.rows if row.interval is not None), None)
    found = {}
    for pair in table.pairs:
        if best in (pair.a, pair.b):
            found[pair.b if pair.a == best else pair.a] = pair
    return found


def _verdict(table: "Table", tested: list["Row"]) -> str:
    best = tested[0]
    shown = f"{best.label} has the best mean {table.metric}, {score(best.score)}"
    if len(tested) == 1:
        return f"{shown} (95% interval {interval(best.interval)}); there is nothing to compare it to."
    group = [row.label for row in tested if row.in_best_group]
    behind = [row.label for row in tested if not row.in_best_group]
    if not behind:
        what = "Neither method" if len(tested) == 2 else f"No method of the {len(tested)}"
        return f"{shown}, but {what[0].lower()}{what[1:]} can be told apart from it: {listed(group)}."
    against = pairs_with_best(table)
    worst = max(against[label].p_adjusted for label in behind)
    ahead = f"it is ahead of {listed(behind)} (adjusted p at most {_p(worst)})"
    if len(group) == 1:
        return f"{shown}: {ahead}."
    return f"{shown}: {ahead} and cannot be told apart from {listed(group[1:])}."


def _cheapest(tested: list["Row"]) -> list[str]:
    """The method to take if memory is short, among those that no test puts behind the best."""
    group = [row for row in tested if row.in_best_group and row.figures.peak_bytes]
    if not group:
        return []
    cheap = min(group, key=lambda row: row.figures.peak_bytes or 0)
    peak = f"{mib(cheap.figures.peak_bytes)} MiB in a training step"
    if len(group) == 1:
        return [f"{cheap.label} peaks at {peak}."]
    best = group[0]
    if cheap is best:
        return [f"It is also the cheapest in memory of them: {peak}."]
    than = f", against {mib(best.figures.peak_bytes)} MiB for {best.label}"
    return [f"The cheapest in memory of these is {cheap.label}: {peak}{than}."]


def _certainty(table: "Table") -> list[str]:
    if not table.pairs:
        return []
    sizes = sorted(pair.detectable for pair in table.pairs)
    low, high = sizes[0], sizes[-1]
    size = f"{low:.3f}" if high - low < 0.001 else f"{low:.3f} to {high:.3f}, depending on the pair"
    what = "could not be told apart" if not any(p.is_separated for p in table.pairs) else ""
    against = pairs_with_best(table)
    nearest = [(p.p_adjusted, label) for label, p in against.items() if not p.is_separated]
    sure = f" The clearest of these was {min(nearest)[1]} (adjusted p {_p(min(nearest)[0])})."
    return [
        f"How sure: on {plural(table.examples, 'validation example')} this design finds, 4 times "
        f"in 5, a true difference in {table.metric} of {size}; a smaller one would mostly be "
        f"missed, so not told apart does not mean equal.{sure if nearest and not what else ''}"
    ]


def _one_seed(tested: list["Row"]) -> list[str]:
    alone = [row.label for row in tested if len(row.scores) == 1]
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
        f"{best.label} has the best mean {table.metric}, {score(best.score)}; without per-example "
        "predictions that can be used, nothing is tested."
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


def _p(value: float) -> str:
    return probability(value)
