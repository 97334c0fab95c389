"""Learning curves: a value over optimizer steps, arms as bold lines, their seeds as thin ones.

Called by the charts; imports the drawing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

import numpy as np

from peftkit.reporting import svg

HEIGHT: Final = 310
MAX_POINTS: Final = 60
"""Of one line; the steps between are left out evenly."""
MAX_LABEL: Final = 17

Line = list[tuple[int, float]]
"""(optimizer step, value), by step."""


@dataclass(frozen=True)
class Curve:
    """The lines of one arm."""

    place: int
    anchor: str
    label: str
    seeds: tuple[Line, ...]


def curves(arms: Sequence[Curve], name: str) -> str:
    """The chart as SVG; each arm has at least one line of at least one point."""
    labels = [_cut(arm.label) for arm in arms]
    right = svg.WIDTH - 14 - max(svg.text_width(label) for label in labels)
    steps = [step for arm in arms for line in arm.seeds for step, _ in line]
    values = [value for arm in arms for line in arm.seeds for _, value in line]
    x = svg.Axis(0, max(*steps, 1), 52, right)
    y = svg.axis_over(values, HEIGHT - 48, 24)
    means = [_thinned(mean_line(arm.seeds)) for arm in arms]
    parts = [svg.frame(x, y, "optimizer step", name)]
    parts += [
        _path(_thinned(s), x, y, "seed", a.place) for a in arms for s in a.seeds if a.seeds[1:]
    ]
    parts += [_arm(arm, mean, x, y) for arm, mean in zip(arms, means, strict=True)]
    parts += _end_labels(arms, labels, means, x, y)
    return svg.drawing(HEIGHT, f"{name} over optimizer steps", "".join(parts))


def mean_line(lines: Sequence[Line]) -> Line:
    """Mean over the lines, at the steps that all of them have; without any, the longest line."""
    common = set.intersection(*({step for step, _ in line} for line in lines))
    if not common:
        return max(lines, key=len)
    by_step = [dict(line) for line in lines]
    return [(s, float(np.mean([line[s] for line in by_step]))) for s in sorted(common)]


def _thinned(line: Line) -> Line:
    if len(line) <= MAX_POINTS:
        return line
    kept = np.unique(np.linspace(0, len(line) - 1, MAX_POINTS).round().astype(int))
    return [line[i] for i in kept]


def _path(line: Line, x: svg.Axis, y: svg.Axis, kind: str, place: int) -> str:
    points = "L".join(f"{x.at(step):.1f} {y.at(value):.1f}" for step, value in line)
    return f'<path class="{kind} c{svg.style_of(place)[0]}" d="M{points}"/>'


def _arm(arm: Curve, mean: Line, x: svg.Axis, y: svg.Axis) -> str:
    """The mean line and, at its end, the arm's mark: a link as in the other charts."""
    colour, shape = svg.style_of(arm.place)
    step, value = mean[-1]
    tip = f"{arm.label}: {value:.4f} after step {step:,}"
    return (
        f"{_path(mean, x, y, 'mean', arm.place)}"
        f'<a href="#{arm.anchor}" class="c{colour}"><title>{escape(tip)}</title>'
        f'<use href="#m{shape}" x="{x.at(step):.1f}" y="{y.at(value):.1f}"/></a>'
    )


def _end_labels(
    arms: Sequence[Curve], labels: list[str], means: list[Line], x: svg.Axis, y: svg.Axis
) -> list[str]:
    ends = [(x.at(mean[-1][0]), y.at(mean[-1][1])) for mean in means]
    rows = svg.spread_out([row for _, row in ends], svg.LINE_HEIGHT, y.end, y.start - 2)
    parts = []
    for arm, label, (left, top), row in zip(arms, labels, ends, rows, strict=True):
        colour, _ = svg.style_of(arm.place)
        at = x.end + 12
        if abs(row - top) > 4 or at - left > 20:
            line = f"M{left + 7:.1f} {top:.1f}L{at - 2:.1f} {row:.1f}"
            parts.append(f'<path class="leader c{colour}" d="{line}"/>')
        parts.append(
            f'<text class="name c{colour}" x="{at:.1f}" y="{row + 4:.1f}">{escape(label)}</text>'
        )
    return parts


def _cut(label: str) -> str:
    return label if len(label) <= MAX_LABEL else f"{label[: MAX_LABEL - 1]}…"
