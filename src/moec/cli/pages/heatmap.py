"""Heat maps and stacked bars as SVG; cells are the pixels of a picture within it, so that large ones stay small."""

from __future__ import annotations

import base64
import struct
import zlib
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from moec.cli.pages.page import COLOURS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

MOST_WIDTH, MOST_CELL, LEAST_CELL = 880, 18, 2
MARGIN, ABOVE = 46, 22
BAR_WIDTH, BAR_LINE, BAR_LEFT = 620, 26, 190


def heat_map(colours: NDArray[np.uint8], across: str, down: str, title: str) -> str:
    """A map of cells with what goes across and what goes down.

    Args:
        colours: red, green, blue of each cell, ``[rows, columns, 3]``.
        across: what columns are.
        down: what rows are.
        title: for those who cannot see it.
    """
    rows, columns = colours.shape[:2]
    cell = max(LEAST_CELL, min(MOST_CELL, (MOST_WIDTH - MARGIN) // max(1, columns)))
    width, height = columns * cell, rows * cell
    picture = base64.b64encode(png(colours)).decode()
    labels = [
        f'<text x="{MARGIN - 6}" y="{ABOVE + (row + 0.5) * cell + 4:.1f}" text-anchor="end">{row}</text>'
        for row in _marks(rows, cell)
    ]
    labels += [
        f'<text x="{MARGIN + (column + 0.5) * cell:.1f}" y="{ABOVE - 5}" text-anchor="middle">{column}</text>'
        for column in _marks(columns, cell)
    ]
    return (
        f'<svg viewBox="0 0 {MARGIN + width + 4} {ABOVE + height + 20}" width="{MARGIN + width + 4}" role="img" '
        f'aria-label="{escape(title)}">{"".join(labels)}'
        f'<image x="{MARGIN}" y="{ABOVE}" width="{width}" height="{height}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="data:image/png;base64,{picture}"/>'
        f'<text class="soft" x="{MARGIN}" y="{ABOVE + height + 15}">{escape(across)} →</text>'
        f'<text class="soft" transform="translate(11 {ABOVE + 4}) rotate(90)">{escape(down)} →</text></svg>'
    )


def stacked_bars(bars: Sequence[tuple[str, Sequence[float]]], parts: Sequence[str], unit: str) -> str:
    """Bars of several parts each, over one scale, with a legend.

    Args:
        bars: name and the parts' sizes.
        parts: names of the parts.
        unit: of the sizes.
    """
    longest = max((sum(sizes) for _, sizes in bars), default=0.0) or 1.0
    height = BAR_LINE * (len(bars) + 1) + 8
    drawn = [
        f'<svg viewBox="0 0 {BAR_LEFT + BAR_WIDTH + 90} {height}" width="{BAR_LEFT + BAR_WIDTH + 90}" role="img">'
    ]
    x = float(BAR_LEFT)
    for number, name in enumerate(parts):
        drawn.append(f'<rect x="{x:.0f}" y="4" width="12" height="12" fill="{COLOURS[number]}"/>')
        drawn.append(f'<text x="{x + 17:.0f}" y="15">{escape(name)}</text>')
        x += 30 + 7 * len(name)
    for line, (name, sizes) in enumerate(bars, 1):
        y, x = BAR_LINE * line, float(BAR_LEFT)
        drawn.append(f'<text x="{BAR_LEFT - 8}" y="{y + 15}" text-anchor="end">{escape(name)}</text>')
        for number, size in enumerate(sizes):
            width = size / longest * BAR_WIDTH
            label = f"{name}, {parts[number]}: {size:.2f} {unit}"
            drawn.append(
                f'<rect x="{x:.1f}" y="{y + 2}" width="{width:.1f}" height="17" fill="{COLOURS[number]}">'
                f"<title>{escape(label)}</title></rect>"
            )
            x += width
        drawn.append(
            f'<text class="soft" x="{x + 6:.1f}" y="{y + 15}">{sum(sizes):.2f} {escape(unit)}</text>'
        )
    return "\n".join([*drawn, "</svg>"])


def png(colours: NDArray[np.uint8]) -> bytes:
    """A picture of ``[rows, columns, 3]`` pixels in the PNG format (W3C, 8-bit truecolour, no filter)."""
    rows, columns = colours.shape[:2]
    lines = np.zeros((rows, 1 + 3 * columns), np.uint8)
    lines[:, 1:] = colours.reshape(rows, 3 * columns)
    header = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(_chunk, *zip(*parts, strict=True)))


def shades(strength: NDArray[np.float64], colour: str) -> NDArray[np.uint8]:
    """From a pale to the full ``colour`` (``#rrggbb``) for strengths 0 .. 1, of any shape: ``[..., 3]``."""
    full = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)], np.float64)
    pale = full + (255 - full) * 0.82
    mixed: NDArray[np.uint8] = np.round(
        pale + (full * 0.85 - pale) * np.clip(strength, 0, 1)[..., None]
    ).astype(np.uint8)
    return mixed


def _chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def _marks(count: int, cell: int) -> range:
    """Numbers to write along ``count`` cells, far enough apart to be read."""
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128) if step * cell >= 26 or step == 128)
    return range(0, count, step)
