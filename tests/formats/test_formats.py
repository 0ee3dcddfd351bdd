from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moec.formats import (
    ALIASES,
    FORMATS,
    Format,
    Quantized,
    dequantize,
    dequantize_rows,
    format_of,
    pack_rows,
    row_bytes,
    row_layout,
    unpack_rows,
)
from moec.formats.minifloat import MINIFLOATS, e8m0_values
from tests.support.formats import random_quantized

names = pytest.mark.parametrize("kind", FORMATS.values(), ids=FORMATS)


@names
@given(st.integers(1, 3), st.integers(1, 300), st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_rows_come_back_as_they_were(kind: Format, rows: int, columns: int, seed: int) -> None:
    quantized = random_quantized(kind, rows, columns, seed)
    packed = pack_rows(kind, quantized)
    assert packed.shape == (rows, row_bytes(kind, columns))
    found = unpack_rows(kind, packed, columns)
    np.testing.assert_array_equal(found.codes, quantized.codes)
    np.testing.assert_array_equal(found.scales, quantized.scales)
    if quantized.minima is not None:
        np.testing.assert_array_equal(found.minima, quantized.minima)
    if quantized.zeros is None:
        assert found.zeros is None
    else:
        np.testing.assert_array_equal(found.zeros, quantized.zeros)


@names
def test_values_are_those_of_plain_loops(kind: Format) -> None:
    """Byte by byte, as the layout's text says it."""
    columns = 150
    packed = pack_rows(kind, random_quantized(kind, 2, columns, seed=3))
    np.testing.assert_array_equal(
        dequantize_rows(kind, packed, columns),
        [[_value(kind, row, k, columns) for k in range(columns)] for row in packed],
    )


def _value(kind: Format, row: NDArray[np.uint8], column: int, columns: int) -> np.float32:
    padded, groups, group = -(-columns // 32) * 32, -(-columns // kind.group), column // kind.group
    if kind.bits == 8:
        code, codes_bytes = int(row[column]), padded
    else:
        block, place = divmod(column, 32)
        byte = int(row[block * 16 + place % 16])
        code, codes_bytes = (byte >> 4 if place >= 16 else byte & 15), padded // 2
    scale_type: np.dtype[Any] = np.dtype({"float16": "<f2", "float32": "<f4", "e8m0": "u1"}[kind.scale])
    begin = codes_bytes + group * scale_type.itemsize
    scale = row[begin : begin + scale_type.itemsize].view(scale_type)[0]
    offsets = codes_bytes + groups * scale_type.itemsize
    zero = int(row[offsets + group]) if kind.zero_points else 0 if kind.minima else 8
    if kind.codes == "int8":
        value = np.float32(code - 256 if code > 127 else code)
    elif kind.codes == "int4":
        value = np.float32(code - zero)
    else:
        value = MINIFLOATS[kind.codes].values()[code]
    factor = np.float32(2.0 ** (int(scale) - 127)) if kind.scale == "e8m0" else np.float32(scale)
    if kind.minima:
        minimum = row[offsets + 2 * group : offsets + 2 * group + 2].view("<f2")[0]
        return factor * value + np.float32(minimum)
    return factor * value


@pytest.mark.parametrize("kind", [kind for kind in FORMATS.values() if not kind.minima], ids=lambda k: k.name)
def test_codes_beyond_the_last_column_are_those_of_zero(kind: Format) -> None:
    columns = 70
    packed = pack_rows(kind, random_quantized(kind, 3, columns, seed=5))
    place = row_layout(kind, columns)
    wider = np.zeros((3, row_bytes(kind, place.padded)), np.uint8)
    wider[:, : packed.shape[1]] = packed
    assert place.groups == row_layout(kind, place.padded).groups
    assert not dequantize_rows(kind, wider, place.padded)[:, columns:].any()


@names
def test_rows_are_aligned_and_no_larger_than_said(kind: Format) -> None:
    for columns in (1, 31, 32, 33, 127, 128, 129, 1408, 2048):
        place = row_layout(kind, columns)
        scales = place.groups * {"float16": 2, "float32": 4, "e8m0": 1}[kind.scale]
        offsets = place.groups * (2 if kind.minima else int(kind.zero_points))
        exact = place.padded * kind.bits // 8 + scales + offsets
        assert place.row_bytes % 16 == 0
        assert exact <= place.row_bytes < exact + 16
        assert place.scales_offset % 16 == 0


def test_eight_bit_floats_are_torchs() -> None:
    codes = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(MINIFLOATS["e4m3"].values(), expected)
    expected = torch.from_numpy(codes).view(torch.float8_e8m0fnu).float().numpy()
    np.testing.assert_array_equal(e8m0_values(), expected)


def test_four_bit_floats_are_the_specifications() -> None:
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    np.testing.assert_array_equal(MINIFLOATS["e2m1"].values(), positive + [-value for value in positive])


def test_encoding_eight_bit_floats_rounds_as_torch_does() -> None:
    generator = np.random.default_rng(0)
    values = np.concatenate(
        (
            generator.normal(scale=100, size=3000),
            generator.normal(scale=0.01, size=3000),
            [0.0, -0.0, 448, 2**-10, 3 * 2**-10, 0.0155, 17, 19, -25],
        )
    ).astype(np.float32)
    values = np.clip(values, -448, 448)
    expected = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(MINIFLOATS["e4m3"].encode(values), expected)


def test_every_four_bit_float_is_nearest_and_ties_are_even() -> None:
    encoding = MINIFLOATS["e2m1"]
    values = np.linspace(-8, 8, 4097, dtype=np.float32)
    found = encoding.encode(values)
    table = encoding.values()
    distances = np.abs(values[:, None] - table)
    np.testing.assert_array_equal(np.abs(values - table[found]), distances.min(1))
    tied = (distances[:, :8] == distances.min(1)[:, None]).sum(1) > 1
    assert tied.any()
    assert not (found[tied] & 1).any()


def test_names() -> None:
    assert format_of("bfloat16") is None
    assert format_of("int4-g32") is FORMATS["int4-g32"]
    assert all(format_of(alias) is FORMATS[name] for alias, name in ALIASES.items())
    with pytest.raises(KeyError):
        format_of("int5")


def test_dequantized_products_are_rounded_once() -> None:
    codes: NDArray[Any] = np.full((1, 1), 127, np.int8)
    scales = np.array([[0.1]], np.float16)
    value = dequantize(FORMATS["int8-g32"], Quantized(codes, scales))
    assert value.dtype == np.float32
    assert value[0, 0] == np.float32(float(scales[0, 0]) * 127)
