"""A matrix [N, K] as N rows of bytes, each one stream: codes, scales, zero points or minima, padding to 16 bytes.

With Kp = K rounded up to 32 and G = ceil(K / group), a row is

- codes: Kp bytes, or for codes of 4 bits 16 bytes for each 32 columns, byte j of them with column j in its low
  half and column j + 16 in its high half. Codes beyond K are those of zero, with minima 0.
- scales: G of them, little endian.
- zero points: G bytes, where the format has them; or minima: G float16, little endian.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moec.formats.record import SCALE_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moec.formats.record import Format

BLOCK = 32
"""Columns whose codes lie together."""
ROW_ALIGNMENT = 16

CODE_TYPES: dict[str, type[np.generic]] = {
    "int8": np.int8,
    "int4": np.uint8,
    "e4m3": np.uint8,
    "e2m1": np.uint8,
}
SCALE_TYPES: dict[str, type[np.generic]] = {"float16": np.float16, "float32": np.float32, "e8m0": np.uint8}
SYMMETRIC_ZERO = 8
"""The zero point of int4 without zero points."""


@dataclass(frozen=True)
class RowLayout:
    """Where the parts of a row begin, in bytes."""

    columns: int
    padded: int
    """Columns that have codes: ``columns`` rounded up to 32."""
    groups: int
    codes_bytes: int
    scales_offset: int
    zeros_offset: int
    """Where zero points or minima begin; without them, where padding does."""
    row_bytes: int


@dataclass(frozen=True, eq=False)
class Quantized:
    """A matrix of N rows and K columns in a format's own terms, with G groups a row."""

    codes: NDArray[Any]
    """``[N, K]``: int8 for ``int8``, else uint8; codes of 4 bits take a byte each here."""
    scales: NDArray[Any]
    """``[N, G]``: float16, float32, or for E8M0 uint8."""
    zeros: NDArray[np.uint8] | None = None
    """``[N, G]``, where the format has zero points."""
    minima: NDArray[np.float16] | None = None
    """``[N, G]``, where it has minima."""


def row_layout(kind: Format, columns: int) -> RowLayout:
    """Lay out a row of ``columns`` values."""
    padded = -(-columns // BLOCK) * BLOCK
    groups = -(-columns // kind.group)
    codes_bytes = padded * kind.bits // 8
    zeros_offset = codes_bytes + groups * SCALE_BYTES[kind.scale]
    end = zeros_offset + groups * kind.offset_bytes
    size = -(-end // ROW_ALIGNMENT) * ROW_ALIGNMENT
    return RowLayout(columns, padded, groups, codes_bytes, codes_bytes, zeros_offset, size)


def row_bytes(kind: Format, columns: int) -> int:
    """Bytes of a row of ``columns`` values."""
    return row_layout(kind, columns).row_bytes


def pack_rows(kind: Format, quantized: Quantized) -> NDArray[np.uint8]:
    """The bytes of a matrix: uint8 ``[N, row_bytes]``."""
    rows, columns = quantized.codes.shape
    place = row_layout(kind, columns)
    packed = np.zeros((rows, place.row_bytes), np.uint8)
    codes: NDArray[Any] = quantized.codes.astype(CODE_TYPES[kind.codes], copy=False).view(np.uint8)
    if columns < place.padded:
        codes = _padded(kind, codes, quantized.zeros, place)
    if kind.bits == 4:
        halves = codes.reshape(rows, -1, 2, BLOCK // 2)
        codes = (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(rows, -1)
    packed[:, : place.codes_bytes] = codes
    scales = np.ascontiguousarray(quantized.scales, SCALE_TYPES[kind.scale])
    packed[:, place.scales_offset : place.zeros_offset] = scales.view(np.uint8)
    if kind.zero_points:
        assert quantized.zeros is not None
        packed[:, place.zeros_offset : place.zeros_offset + place.groups] = quantized.zeros
    if kind.minima:
        assert quantized.minima is not None
        minima = np.ascontiguousarray(quantized.minima, np.float16).view(np.uint8)
        packed[:, place.zeros_offset : place.zeros_offset + 2 * place.groups] = minima
    return packed


def unpack_rows(kind: Format, packed: NDArray[np.uint8], columns: int) -> Quantized:
    """What ``pack_rows`` took, of a matrix with ``columns`` columns."""
    rows = packed.shape[0]
    place = row_layout(kind, columns)
    codes = packed[:, : place.codes_bytes]
    if kind.bits == 4:
        blocks = codes.reshape(rows, -1, BLOCK // 2)
        codes = np.stack((blocks & 15, blocks >> 4), 2).reshape(rows, -1)
    codes = np.ascontiguousarray(codes[:, :columns]).view(CODE_TYPES[kind.codes])
    scales = np.ascontiguousarray(packed[:, place.scales_offset : place.zeros_offset])
    offsets = packed[:, place.zeros_offset : place.zeros_offset + kind.offset_bytes * place.groups]
    zeros = offsets if kind.zero_points else None
    minima = np.ascontiguousarray(offsets).view(np.float16) if kind.minima else None
    return Quantized(codes, scales.view(SCALE_TYPES[kind.scale]), zeros, minima)


def _padded(
    kind: Format,
    codes: NDArray[np.uint8],
    zeros: NDArray[np.uint8] | None,
    place: RowLayout,
) -> NDArray[np.uint8]:
    rows, columns = codes.shape
    result = np.empty((rows, place.padded), np.uint8)
    result[:, :columns] = codes
    if zeros is not None:
        result[:, columns:] = zeros[:, -1:]
    else:
        result[:, columns:] = SYMMETRIC_ZERO if kind.codes == "int4" and not kind.minima else 0
    return result
