"""Score against cost, with intervals and the front of arms that nothing beats in both.

Called by the charts; imports the drawing. Every point is a link to its arm's section.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from peftkit.reporting import svg
from peftkit.reporting.statistics import Interval

HEIGHT: Final = 310
FAR: Final = 14
MAX_WITH_BARS: Final = 60
"""With more points only those of the front have interval bars and labels."""


@dataclass(frozen=True)
class Point:
    """One arm in one chart."""

    place: int
    """Row of its table; gives colour and shape."""
    anchor: str
    label: str
    tip: str
    cost: float
    score: float
    interval: Interval | None


@dataclass(frozen=True)
class Cost:
    """A horizontal axis, and the score on the vertical one."""

    title: str
    score_name: str
    higher_is_better: bool


def front_of(points: Sequence[Point], *, higher_is_better: bool) -> list[Point]:
    """Points that no other beats or equals in one and equals in the other, the cheapest first."""
    sign = -1 if higher_is_better else 1
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, sign * p.score)):
        if not found or sign * point.score < sign * found[-1].score:
            found.append(point)
    return found


def pareto(points: Sequence[Point], cost: Cost) -> str:
    """The chart as SVG; `points` must not be empty."""
    x = svg.axis_over([p.cost for p in points], 52, svg.WIDTH - 12, log_from=12)
    y = svg.axis_over(_heights(points), HEIGHT - 48, 24)
    front = front_of(points, higher_is_better=cost.higher_is_better)
    detailed = front if len(points) > MAX_WITH_BARS else list(points)
    parts = [svg.frame(x, y, cost.title, cost.score_name), _front_line(front, x, y)]
    parts += [_bar(p, x, y) for p in detailed if p.interval]
    parts += [_link(p, x, y) for p in points]
    parts += _labels(points, detailed, (x, y), _step_boxes(front, x, y))
    return svg.drawing(HEIGHT, f"{cost.score_name} against {cost.title}", "".join(parts))


def _heights(points: Sequence[Point]) -> list[float]:
    scores = [p.score for p in points]
    if len(points) > MAX_WITH_BARS:
        return scores
    return scores + [bound for p in points if p.interval for bound in p.interval]


def _front_line(front: Sequence[Point], x: svg.Axis, y: svg.Axis) -> str:
    """Steps: at each cost, the best score that can be had for it."""
    steps = f"M{x.at(front[0].cost):.1f} {y.at(front[0].score):.1f}"
    for point in front[1:]:
        steps += f"H{x.at(point.cost):.1f}V{y.at(point.score):.1f}"
    return f'<path class="front" d="{steps}H{x.end:.0f}"/>'


def _bar(point: Point, x: svg.Axis, y: svg.Axis) -> str:
    assert point.interval
    at, (low, high) = x.at(point.cost), (y.at(bound) for bound in point.interval)
    colour, _ = svg.style_of(point.place)
    return (
        f'<path class="bar c{colour}" d="M{at:.1f} {low:.1f}V{high:.1f}'
        f'M{at - 3:.1f} {low:.1f}h6M{at - 3:.1f} {high:.1f}h6"/>'
    )


def _link(point: Point, x: svg.Axis, y: svg.Axis) -> str:
    colour, shape = svg.style_of(point.place)
    return (
        f'<a href="#{point.anchor}" class="c{colour}"><title>{escape(point.tip)}</title>'
        f'<use href="#m{shape}" x="{x.at(point.cost):.1f}" y="{y.at(point.score):.1f}"/></a>'
    )


def _step_boxes(front: Sequence[Point], x: svg.Axis, y: svg.Axis) -> list[svg.Box]:
    """Where the line of the front runs."""
    at = [(x.at(p.cost), y.at(p.score)) for p in front]
    ends = [*at[1:], (x.end, at[-1][1])]
    flat = [svg.Box(x0, y0 - 1, x1, y0 + 1) for (x0, y0), (x1, _) in zip(at, ends, strict=True)]
    steep = zip(at, ends, strict=True)
    return flat + [svg.Box(x1 - 1, min(y0, y1), x1 + 1, max(y0, y1)) for (_, y0), (x1, y1) in steep]


def _labels(
    points: Sequence[Point],
    labelled: Sequence[Point],
    axes: tuple[svg.Axis, svg.Axis],
    soft: list[svg.Box],
) -> list[str]:
    """Names beside their points where they cover no point and no other name."""
    x, y = axes
    at = {p.anchor: (x.at(p.cost), y.at(p.score)) for p in points}
    taken = [svg.Box(left - 7, top - 7, left + 7, top + 7) for left, top in at.values()]
    soft += [
        svg.Box(
            at[p.anchor][0] - 2, y.at(p.interval.high), at[p.anchor][0] + 2, y.at(p.interval.low)
        )
        for p in labelled
        if p.interval
    ]
    bounds = svg.Box(x.start, y.end - 8, svg.WIDTH, y.start)
    parts = []
    for point in labelled:
        found = svg.placed_label(at[point.anchor], point.label, bounds, taken, soft)
        if found:
            left, base, box = found
            taken.append(box)
            colour, _ = svg.style_of(point.place)
            parts.append(_leader(at[point.anchor], box, colour))
            text = escape(point.label)
            parts.append(
                f'<text class="name c{colour}" x="{left:.1f}" y="{base:.1f}">{text}</text>'
            )
    return parts


def _leader(mark: tuple[float, float], box: svg.Box, colour: int) -> str:
    """A line to a label that stands too far from its point to be taken for its name."""
    x = min(max(mark[0], box.left), box.right)
    y = min(max(mark[1], box.top), box.bottom)
    if math.dist(mark, (x, y)) <= FAR:
        return ""
    return f'<path class="leader c{colour}" d="M{mark[0]:.1f} {mark[1]:.1f}L{x:.1f} {y:.1f}"/>'
