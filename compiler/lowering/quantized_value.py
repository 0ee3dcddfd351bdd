"""One value of a quantized row as an expression, for loops that read a few; products have kernels of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tvm import tirx

from moec.formats import row_layout
from moec.formats.minifloat import FLOAT32_BIAS, FLOAT32_MANTISSA, MINIFLOATS, MiniFloat
from moec.formats.rows import BLOCK, SYMMETRIC_ZERO

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.formats import Format

FLOAT16 = MiniFloat(bits=16, mantissa=10, bias=15, largest=65504.0)
"""As integers, so that no target has to have the type."""
NAN_BITS = 0x7FC00000
SMALLEST_SCALE_BITS = 0x00400000
"""Of 2 ** -127, the E8M0 scale that float32 has as a subnormal number."""


def value_at(kind: Format, columns: int, byte: Callable[[Any], Any], column: Any) -> Any:
    """The float32 value in ``column`` of a row of ``columns`` values, whose bytes ``byte`` reads."""
    place = row_layout(kind, columns)
    group = tirx.indexdiv(column, kind.group)
    scale = _scale(kind, lambda number: byte(place.scales_offset + number), group)
    if kind.minima:
        minimum = _float16(lambda number: byte(place.zeros_offset + number), group)
        return scale * _code(kind, byte, column, 0) + minimum
    zero = _wide(byte(place.zeros_offset + group)) if kind.zero_points else None
    return scale * _code(kind, byte, column, zero)


def _wide(value: Any) -> Any:
    return tirx.Cast("int32", value)


def _number(value: int) -> Any:
    return tirx.const(value, "int32")


def _scale(kind: Format, byte: Callable[[Any], Any], group: Any) -> Any:
    if kind.scale == "e8m0":
        exponent = _wide(byte(group))
        bits = tirx.Select(
            exponent == 0,
            _number(SMALLEST_SCALE_BITS),
            tirx.Select(exponent == 255, _number(NAN_BITS), exponent << FLOAT32_MANTISSA),
        )
        return tirx.reinterpret("float32", bits)
    if kind.scale == "float16":
        return _float16(byte, group)
    return tirx.reinterpret("float32", _word(byte, group * 4, 4))


def _float16(byte: Callable[[Any], Any], number: Any) -> Any:
    """The ``number``-th of a run of float16, as float32."""
    return _float(_word(byte, number * 2, 2), FLOAT16)


def _word(byte: Callable[[Any], Any], first: Any, size: int) -> Any:
    word = _wide(byte(first))
    for number in range(1, size):
        word = word | (_wide(byte(first + number)) << (8 * number))
    return word


def _code(kind: Format, byte: Callable[[Any], Any], column: Any, zero: Any) -> Any:
    if kind.bits == 8:
        code = _wide(byte(column))
    else:
        within = tirx.indexmod(column, BLOCK)
        pair = _wide(byte(tirx.indexdiv(column, BLOCK) * (BLOCK // 2) + tirx.indexmod(within, BLOCK // 2)))
        code = tirx.Select(within < BLOCK // 2, pair & 15, pair >> 4)
    if kind.codes == "int8":
        return tirx.Cast("float32", tirx.Select(code > 127, code - 256, code))
    if kind.codes == "int4":
        return tirx.Cast("float32", code - (SYMMETRIC_ZERO if zero is None else zero))
    return _float(code, MINIFLOATS[kind.codes])


def _float(code: Any, number: MiniFloat) -> Any:
    """Shifted to where float32 has its mantissa, a code is its value times a power of two, subnormal or not."""
    magnitude = code & (number.sign - 1)
    bits = magnitude << (FLOAT32_MANTISSA - number.mantissa)
    bits = tirx.Select(magnitude > number.largest_code, _number(NAN_BITS), bits)
    value = tirx.reinterpret("float32", bits) * tirx.const(2.0 ** (FLOAT32_BIAS - number.bias), "float32")
    return tirx.Select(code >= number.sign, -value, value)
