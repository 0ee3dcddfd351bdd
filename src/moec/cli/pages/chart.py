"""Line charts as SVG."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from moec.cli.pages.page import COLOURS

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH, HEIGHT = 760, 340
LEFT, RIGHT, TOP, BOTTOM = 64, 190, 14, 44
"""Margins; the legend is to the right."""
MOST_TICKS = 6
LEGEND_LINE = 19


@dataclass(frozen=True)
class Line:
    """One curve."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    dashed: bool = False


def chart(lines: Sequence[Line], x_label: str, y_label: str, *, logarithmic: bool = False) -> str:
    """The lines over common axes, with a legend.

    Args:
        lines: at least one, with at least one point; colours go by their order.
        x_label: what x is, with its unit.
        y_label: what y is, with its unit.
        logarithmic: of y, which is then above 0.
    """
    right = max(max(line.x) for line in lines) or 1.0
    ticks = _decades(lines) if logarithmic else _ticks(max(max(line.y) for line in lines) or 1.0)
    low, high = ticks[0], ticks[-1]

    def across(value: float) -> float:
        return LEFT + value / right * (WIDTH - LEFT - RIGHT)

    def up(value: float) -> float:
        straight = (value - low) / (high - low)
        share = math.log(value / low) / math.log(high / low) if logarithmic else straight
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="{escape(y_label)}">'
    ]
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {up(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    parts += [
        f'<text x="{across(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>'
        for tick in _ticks(right)
        if tick <= right * 1.0001
    ]
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="soft" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    parts.append(
        f'<text class="soft" transform="translate(14 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    for number, line in enumerate(lines):
        colour, dashes = COLOURS[number % len(COLOURS)], ' stroke-dasharray="6 4"' if line.dashed else ""
        points = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in zip(line.x, line.y, strict=True))
        stroke = f'fill="none" stroke="{colour}" stroke-width="2"{dashes}'
        parts.append(f'<polyline points="{points}" {stroke}><title>{escape(line.name)}</title></polyline>')
        y = TOP + 10 + LEGEND_LINE * number
        parts.append(f'<path d="M{WIDTH - RIGHT + 14} {y - 4}h22" {stroke}/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 42}" y="{y}">{escape(line.name)}</text>')
    return "\n".join([*parts, "</svg>"])


def _ticks(high: float) -> list[float]:
    """Round numbers from 0 to at least ``high``."""
    rough = high / MOST_TICKS
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.9999)
    return [step * number for number in range(math.ceil(high / step - 1e-9) + 1)]


def _decades(lines: Sequence[Line]) -> list[float]:
    """1, 2 and 5 times powers of ten, around every y."""
    values = [y for line in lines for y in line.y]
    low, high = min(values), max(values)
    steps = [
        factor * 10.0**power
        for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for factor in (1, 2, 5)
    ]
    first = max(number for number, step in enumerate(steps) if step <= low * 1.0001)
    last = min((number for number, step in enumerate(steps) if step >= high * 0.9999), default=len(steps) - 1)
    return steps[first : max(last, first + 1) + 1]
