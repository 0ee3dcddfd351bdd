"""One element of a matrix at a time, quantized or not, for what is not worth a quicker way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.packed.codes import Zero, widening
from moec.compiler.kernels.cuda.packed.rows import PackedRow
from moec.compiler.kernels.cuda.primitives import element, i32, value
from moec.compiler.kernels.cuda.threads import read
from moec.compiler.kernels.emit import i64, load
from moec.formats import format_of
from moec.formats.rows import BLOCK

if TYPE_CHECKING:
    from moec.compiler.kernels.emit import Buffer, Expr
    from moec.formats import Format


def read_element(matrix: Buffer, dtype: str, columns: int, row: Expr, column: Expr) -> Expr:
    """An element as float32.

    Args:
        matrix: flat: elements, or bytes where it is quantized.
        dtype: a type, or the name of a format.
        columns: of the matrix.
        row: int64.
        column: int32.
    """
    kind = format_of(dtype)
    if kind is None:
        return read(matrix, dtype, row * i64(columns) + i64(column))
    packed = PackedRow(kind, columns)
    start = row * i64(packed.layout.row_bytes)
    address = T.bind(value("int64", "address", element(matrix, i64(0))) + start)
    always = T.bool(True)
    zero = Zero.of(kind)
    if kind.zero_points:
        zero = Zero.at(packed.zero_bits(address, column, always))
    scale = packed.scale(packed.scale_bits(address, column, always))
    found = _value(kind, matrix, start, column, zero) * T.float32(widening(kind).factor) * scale
    if kind.minima:
        found = found + packed.minimum(packed.minimum_bits(address, column, always))
    return T.bind(found)


def _value(kind: Format, matrix: Buffer, start: Expr, column: Expr, zero: Zero) -> Expr:
    """What the code of a column stands for, less the format's factor."""
    if kind.bits == 8:
        word = T.cast(load(matrix, start + i64(column)), "uint32")
    else:
        inside = T.truncmod(column, i32(BLOCK))
        byte = T.truncdiv(column, i32(BLOCK)) * i32(BLOCK // 2) + T.truncmod(inside, i32(BLOCK // 2))
        high = T.cast(T.truncdiv(inside, i32(BLOCK // 2)), "uint32")
        word = T.cast(load(matrix, start + i64(byte)), "uint32") >> (high * T.uint32(4))
    codes = widening(kind)
    pairs = codes.emit(T.bind(word), zero, codes.constant_masks())
    return value("float32", "low_f16", pairs[0])
