"""Stacked bars of the memory peaks by phase, beside what the planner expected.

Called by the charts; imports the drawing. The peaks of the phases are stacked in the order of their
height, so that each part is what its phase adds to the phases below it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from peftkit.reporting import svg
from peftkit.reporting.figure_text import MIB, mib
from peftkit.reporting.tables import PHASE_WORDS

ROW: Final = 40
TOP: Final = 4


@dataclass(frozen=True)
class Bar:
    """One arm: phase → peak in bytes, and the predicted peak of a training step."""

    place: int
    anchor: str
    label: str
    peaks: Mapping[str, int]
    predicted: int | None


def memory_bars(bars: Sequence[Bar]) -> str:
    """The chart as SVG; each bar has at least one peak."""
    largest = max(max(*bar.peaks.values(), bar.predicted or 0) for bar in bars) / MIB
    bottom = TOP + ROW * len(bars) + 6
    x = svg.Axis(0, largest, 6, svg.WIDTH - 62)
    parts = ['<g class="axes">']
    for value, text in x.labelled_ticks():
        at = x.at(value)
        parts.append(f'<path d="M{at:.1f} {TOP}V{bottom}"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 15}" class="m">{text}</text>')
    middle = (x.start + x.end) / 2
    parts.append(
        f'<text x="{middle:.0f}" y="{bottom + 33}" class="m">peak of live tensors, MiB</text></g>'
    )
    parts += [_bar(bar, TOP + ROW * row, x) for row, bar in enumerate(bars)]
    return svg.drawing(bottom + 38, "Memory peaks by phase", "".join(parts))


def parts_of(peaks: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """(phase, from, to) in bytes, from the lowest peak to the highest; empty parts left out."""
    found, below = [], 0
    for phase, peak in sorted(peaks.items(), key=lambda item: item[1]):
        if peak > below:
            found.append((phase, below, peak))
            below = peak
    return found


def _bar(bar: Bar, top: float, x: svg.Axis) -> str:
    named = ", ".join(f"{PHASE_WORDS[phase]} {mib(peak)}" for phase, peak in bar.peaks.items())
    tip = f"{bar.label}: {named} MiB"
    if bar.predicted:
        tip += f"; predicted for a training step {mib(bar.predicted)} MiB"
    pieces = [
        f'<rect class="p-{phase}" x="{x.at(low / MIB):.1f}" y="{top + 18:.0f}" '
        f'width="{max(x.at(high / MIB) - x.at(low / MIB) - 1, 0.5):.1f}" height="14"/>'
        for phase, low, high in parts_of(bar.peaks)
    ]
    peak = max(bar.peaks.values())
    end = max(x.at(peak / MIB), x.at((bar.predicted or 0) / MIB))
    text = f'<text x="{end + 6:.1f}" y="{top + 29:.0f}" class="value">{mib(peak)}</text>'
    return (
        f'<a href="#{bar.anchor}"><title>{escape(tip)}</title>'
        f'<text x="{x.start}" y="{top + 12:.0f}" class="barname">{escape(bar.label)}</text>'
        f"{''.join(pieces)}{_predicted(bar, top, x)}{text}</a>"
    )


def _predicted(bar: Bar, top: float, x: svg.Axis) -> str:
    if not bar.predicted:
        return ""
    at = x.at(bar.predicted / MIB)
    return f'<path class="predicted" d="M{at:.1f} {top + 15:.0f}v20"/>'
