"""Axes, marks and labels of the page's charts, as SVG text.

Called by the charts; imports nothing of peftkit. Drawn here and not by a plotting library: points
must be links that the keyboard reaches, colours follow the reader's light or dark setting, and the
page may not carry megabytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

WIDTH: Final = 360
LETTER_WIDTH: Final = 7.2
"""Of the 12 px label font, on average and rounded up."""
LINE_HEIGHT: Final = 14
COLOURS: Final = 8
SHAPES: Final = (
    "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0",  # circle
    "M-4.6-4.6h9.2v9.2h-9.2z",  # square
    "M0-6L5.8 4.6H-5.8z",  # triangle
    "M0-6.4L6.4 0L0 6.4L-6.4 0z",  # diamond
    "M0 6L5.8-4.6H-5.8z",  # triangle down
    "M-2-6h4v4h4v4h-4v4h-4v-4h-4v-4h4z",  # plus
    "M0-6.4L6 -2L3.8 5.2H-3.8L-6-2z",  # pentagon
    "M-6 0L-3-5.2H3L6 0L3 5.2H-3z",  # hexagon
)


@dataclass(frozen=True)
class Axis:
    """Values → pixels. `start` may be larger than `end`: a vertical axis grows upwards."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def at(self, value: float) -> float:
        """Pixel of `value`."""
        low, high, value = (self._scaled(v) for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values inside the axis, at most seven."""
        return _log_ticks(self.low, self.high) if self.is_log else _ticks(self.low, self.high)

    def labelled_ticks(self) -> list[tuple[float, str]]:
        """Ticks with their text; on a linear axis all with as many digits after the point."""
        values = self.ticks()
        needed = max((len(f"{value:.10g}".partition(".")[2]) for value in values), default=0)
        digits = [len(f"{v:.10g}".partition(".")[2]) if self.is_log else needed for v in values]
        texts = [f"{v:,.{d}f}".replace("-", "−") for v, d in zip(values, digits, strict=True)]
        return list(zip(values, texts, strict=True))

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.is_log else value


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: "Box") -> bool:
        """Whether the two share an area."""
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )


def axis_over(values: Sequence[float], start: float, end: float, *, log_from: float = 0) -> Axis:
    """An axis over finite `values` with room at both ends.

    Logarithmic where the largest is more than `log_from` times the smallest; 0: never.
    """
    low, high = min(values), max(values)
    if log_from and low > 0 and high > log_from * low:
        room = (high / low) ** 0.12
        return Axis(low / room, high * room, start, end, is_log=True)
    room = (high - low) * 0.1 or abs(high) * 0.1 or 1.0
    bottom = 0.0 if low >= 0 > low - room else low - room
    return Axis(bottom, high + room, start, end)


def frame(x: Axis, y: Axis, x_title: str, y_title: str) -> str:
    """Grid lines, tick labels and titles: one axis below, the other at the left."""
    parts = ['<g class="axes">']
    for value, text in y.labelled_ticks():
        at = y.at(value)
        parts.append(f'<path d="M{x.start:.0f} {at:.1f}H{x.end:.0f}"/>')
        parts.append(f'<text x="{x.start - 6:.0f}" y="{at + 4:.1f}" class="e">{text}</text>')
    for value, text in x.labelled_ticks():
        at = x.at(value)
        parts.append(f'<path d="M{at:.1f} {y.start:.0f}v4"/>')
        parts.append(f'<text x="{at:.1f}" y="{y.start + 17:.0f}" class="m">{text}</text>')
    parts.append(f'<path class="base" d="M{x.start:.0f} {y.start:.0f}H{x.end:.0f}"/>')
    middle = (x.start + x.end) / 2
    parts.append(
        f'<text x="{middle:.0f}" y="{y.start + 35:.0f}" class="m">{escape(x_title)}</text>'
    )
    parts.append(f'<text x="2" y="12">{escape(y_title)}</text></g>')
    return "".join(parts)


def drawing(height: float, name: str, content: str) -> str:
    """The chart's outer element; `name` is what a screen reader says first."""
    box = f"0 0 {WIDTH} {height:.0f}"
    return f'<svg viewBox="{box}" role="group" aria-label="{escape(name)}">{content}</svg>'


def style_of(place: int) -> tuple[int, int]:
    """Colour and shape of the arm in that row: no two of the first 64 share both."""
    return place % COLOURS, (place + place // COLOURS) % len(SHAPES)


def text_width(text: str) -> float:
    """Pixels that a label takes up, roughly and rather too many."""
    return len(text) * LETTER_WIDTH


def placed_label(
    at: tuple[float, float], text: str, bounds: Box, taken: list[Box], soft: Sequence[Box]
) -> tuple[float, float, Box] | None:
    """Where a label beside a mark covers nothing in `taken`, and as little of `soft` as can be.

    Returns the left end of its base line and its box; None if there is no room. Nearer places and
    the right-hand side are tried first.
    """
    width, found = text_width(text), []
    for rank, (left, middle) in enumerate(_places(at, width)):
        box = Box(left, middle - LINE_HEIGHT / 2, left + width, middle + LINE_HEIGHT / 2)
        inside = box.left >= bounds.left and box.right <= bounds.right
        inside = inside and box.top >= bounds.top and box.bottom <= bounds.bottom
        if inside and not any(box.overlaps(other) for other in taken):
            found.append((sum(box.overlaps(other) for other in soft), rank, box))
    if not found:
        return None
    box = min(found, key=lambda entry: entry[:2])[2]
    return box.left, box.bottom - 3.5, box


def spread_out(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions in the order of `wanted`, as near to it as `gap` between them allows."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    places = [0.0] * len(wanted)
    last = low - gap
    for i in order:
        last = places[i] = max(wanted[i], last + gap)
    limit = high
    for i in reversed(order):
        places[i] = min(places[i], limit)
        limit = places[i] - gap
    return places


def _places(at: tuple[float, float], width: float) -> list[tuple[float, float]]:
    x, y = at
    found = []
    for far in (0, 8, 18, 30):
        near, up = 10 + far, LINE_HEIGHT * 0.9 + far
        found += [(x + near, y), (x - near - width, y)]
        found += [
            (x + 6, y - up),
            (x + 6, y + up),
            (x - width - 6, y - up),
            (x - width - 6, y + up),
        ]
        found += [(x - width / 2, y - up), (x - width / 2, y + up)]
    return found


def _ticks(low: float, high: float) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (step * factor) <= 5.5)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        found = [d * 10.0**n for n in decades for d in digits if low <= d * 10.0**n <= high]
        if len(found) <= 7:
            return found
    return found
