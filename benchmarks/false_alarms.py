"""How often the comparison tells equal methods apart, and how often it finds a real difference.

Simulates two methods of three seeds on 872 examples, about 92% right. Difficulty is shared by all
runs; methods, seeds and runs have effects of their own. Beside peftkit's test stand two usual ones.

    python benchmarks/false_alarms.py --json benchmarks/results/false_alarms.json
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy import stats

from peftkit.reporting.resampling import spread
from peftkit.reporting.statistics import LEVEL, Sample, components, pair_tests

EXAMPLES, SEEDS = 872, 3
SEED_SPREADS = (0.0, 0.3, 0.8)
"""In logits, of a seed's effect."""
AHEAD = (0.0, 1.6, 2.9)
"""In logits, of the first method."""
BLOCK = 100


def answers(rng: np.random.Generator, seed_spread: float, ahead: float) -> np.ndarray:
    """Which examples each run answers rightly, (2 x SEEDS, EXAMPLES)."""
    own = rng.normal(0, 1.5, (2, 1, EXAMPLES))
    seeds = rng.normal(0, seed_spread, (2, SEEDS, 1))
    noise = rng.normal(0, 1.0, (2, SEEDS, EXAMPLES))
    logits = rng.normal(13, 9, EXAMPLES) + own + seeds + noise
    logits[0] += ahead
    right = rng.random(logits.shape) < 1 / (1 + np.exp(-logits.clip(-50, 50)))
    return right.reshape(2 * SEEDS, EXAMPLES)


def samples(count: int, seed_spread: float, ahead: float) -> Iterator[Sample]:
    """Independent comparisons."""
    rng = np.random.default_rng(0)
    for start in range(0, count, BLOCK):
        worlds = [answers(rng, seed_spread, ahead) for _ in range(min(BLOCK, count - start))]
        columns = [{"label": np.ones(EXAMPLES), "prediction": run} for w in worlds for run in w]
        covariance = spread("accuracy", columns)
        for place, right in enumerate(worlds):
            runs = slice(place * len(right), (place + 1) * len(right))
            arm = np.repeat([0, 1], SEEDS)
            yield Sample(right.mean(axis=1), covariance[runs, runs], arm)


def p_values(sample: Sample) -> tuple[float, float, float]:
    """Of peftkit's test, of the paired bootstrap over examples, of Welch's t over seeds."""
    parts = components(sample)
    tests = pair_tests(parts, EXAMPLES)
    over_examples = parts.examples[0, 0] + parts.examples[1, 1] - 2 * parts.examples[0, 1]
    statistic = abs(tests.difference[0]) / np.sqrt(over_examples)
    return float(tests.p[0]), float(2 * stats.norm.sf(statistic)), welch(sample.scores)


def welch(scores: np.ndarray) -> float:
    """By hand, because scipy warns of three equal scores, which happen."""
    a, b = np.split(scores, 2)
    parts = np.array([a.var(ddof=1), b.var(ddof=1)]) / SEEDS
    if not parts.any():
        return 0.0 if a.mean() != b.mean() else 1.0
    freedom = parts.sum() ** 2 / (parts**2 / (SEEDS - 1)).sum()
    return float(2 * stats.t.sf(abs(a.mean() - b.mean()) / np.sqrt(parts.sum()), freedom))


def measured(count: int, seed_spread: float, ahead: float) -> dict[str, float]:
    """Shares of comparisons in which the two are told apart, and the true difference."""
    made = list(samples(count, seed_spread, ahead))
    told = np.mean([np.array(p_values(sample)) < LEVEL for sample in made], axis=0)
    pairs = np.array([sample.scores.reshape(2, SEEDS) for sample in made])
    return {
        "seed_spread_logits": seed_spread,
        "seed_spread_observed": round(float(pairs[:, 1].std(axis=1, ddof=1).mean()), 4),
        "accuracy": round(float(pairs[:, 1].mean()), 4),
        "difference": round(float((pairs[:, 0] - pairs[:, 1]).mean()), 4),
        "peftkit": round(float(told[0]), 4),
        "examples_only": round(float(told[1]), 4),
        "welch_over_seeds": round(float(told[2]), 4),
    }


def main() -> None:
    """Print one line a setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    lines = []
    for ahead in AHEAD:
        for seed_spread in SEED_SPREADS:
            lines.append(measured(arguments.simulations, seed_spread, ahead))
            print(lines[-1], flush=True)
    if arguments.json:
        content = {"simulations": arguments.simulations, "settings": lines}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
