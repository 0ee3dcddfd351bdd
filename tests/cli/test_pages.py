from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest

from moec.cli.pages.chart import Line, chart
from moec.cli.pages.heatmap import heat_map, png, shades, stacked_bars
from moec.cli.pages.page import page, section, table


def test_a_picture_is_png_and_has_its_pixels() -> None:
    colours = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    data = png(colours)
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", data[16:24]) == (3, 2)
    begin = data.index(b"IDAT") + 4
    size = struct.unpack(">I", data[begin - 8 : begin - 4])[0]
    assert struct.unpack(">I", data[begin + size : begin + size + 4])[0] == zlib.crc32(
        data[begin - 4 : begin + size]
    )
    lines = np.frombuffer(zlib.decompress(data[begin : begin + size]), np.uint8).reshape(2, 10)
    assert lines[:, 0].tolist() == [0, 0]
    assert np.array_equal(lines[:, 1:].reshape(2, 3, 3), colours)


def test_shades_go_from_pale_to_full() -> None:
    pale, middle, full = shades(np.array([0.0, 0.5, 1.0]), "#2f6fde").astype(int)
    assert (pale > middle).all()
    assert (middle > full).all()


def test_a_chart_puts_points_where_their_values_are() -> None:
    drawn = chart([Line("one", (0.0, 50.0, 100.0), (0.0, 0.5, 1.0))], "x", "y")
    assert 'points="64.0,296.0 317.0,155.0 570.0,14.0"' in drawn
    straight = chart([Line("one", (0.0, 50.0, 100.0), (1.0, 10.0, 100.0))], "x", "y", logarithmic=True)
    assert 'points="64.0,296.0 317.0,155.0 570.0,14.0"' in straight


@pytest.mark.parametrize("values", [(0.0, 0.0), (3.7, 3.7), (0.003, 900.0)])
@pytest.mark.parametrize("logarithmic", [False, True])
def test_charts_of_any_range(values: tuple[float, ...], logarithmic: bool) -> None:
    if logarithmic and min(values) == 0:
        return
    drawn = chart([Line("a", (0.0, 1.0), values)], "x", "y", logarithmic=logarithmic)
    assert "nan" not in drawn
    assert "inf" not in drawn


def test_text_is_escaped() -> None:
    made = page(
        "<b>",
        [
            section("<i>", "a & b", table(("<u>",), [("<s>",)])),
            heat_map(np.zeros((1, 1, 3), np.uint8), "<a>", "<a>", "<a>"),
            stacked_bars([("<a>", [1.0])], ("<a>",), "<a>"),
            chart([Line("<a>", (0.0,), (1.0,))], "<a>", "<a>"),
        ],
    )
    for tag in ("<b>", "<i>", "<u>", "<s>", "<a>", "a & b"):
        assert tag not in made
