"""What quantized weights mean, in numpy: the reference that every kernel is held to, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moec.formats.minifloat import MINIFLOATS, e8m0_values
from moec.formats.rows import SYMMETRIC_ZERO, Quantized, unpack_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moec.formats.record import Format

_TABLES = {codes: kind.values() for codes, kind in MINIFLOATS.items()}
_E8M0 = e8m0_values()


def dequantize(kind: Format, quantized: Quantized) -> NDArray[np.float32]:
    """The values, ``[N, K]``: the float32 product of each code's value and its group's scale, rounded once.

    Where there are minima the product is exact, and the sum is rounded once.
    """
    scales = scale_values(kind, quantized.scales)
    values = code_values(kind, quantized)
    columns = values.shape[1]
    values *= np.repeat(scales, kind.group, 1)[:, :columns]
    if quantized.minima is not None:
        values += np.repeat(quantized.minima.astype(np.float32), kind.group, 1)[:, :columns]
    return values


def dequantize_rows(kind: Format, packed: NDArray[np.uint8], columns: int) -> NDArray[np.float32]:
    """The values of packed rows ``[N, row_bytes]``: ``[N, columns]``."""
    return dequantize(kind, unpack_rows(kind, packed, columns))


def scale_values(kind: Format, scales: NDArray[Any]) -> NDArray[np.float32]:
    """Stored scales as float32."""
    return _E8M0[scales] if kind.scale == "e8m0" else scales.astype(np.float32)


def code_values(kind: Format, quantized: Quantized) -> NDArray[np.float32]:
    """What codes stand for before scale and minimum, ``[N, K]`` of its own memory; exact in 16-bit floats."""
    codes = quantized.codes
    if kind.codes in _TABLES:
        table: NDArray[np.float32] = _TABLES[kind.codes][codes]
        return table
    values: NDArray[np.float32] = codes.astype(np.float32)
    if quantized.zeros is not None:
        values -= np.repeat(quantized.zeros.astype(np.float32), kind.group, 1)[:, : codes.shape[1]]
    elif kind.codes == "int4" and not kind.minima:
        values -= SYMMETRIC_ZERO
    return values
