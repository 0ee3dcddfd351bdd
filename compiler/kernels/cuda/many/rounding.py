"""Float32 activations rounded to a 16-bit type: what tensor cores take as their left operand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda import primitives as cuda
from moec.compiler.kernels.cuda.many.panels import PANEL_PIECES, panel_element
from moec.compiler.kernels.cuda.many.tiles import CHUNK
from moec.compiler.kernels.cuda.packed.codes import SPLIT, TYPE
from moec.compiler.kernels.cuda.primitives import i32
from moec.compiler.kernels.emit import ceildiv, div, i64, load, mod, store, when
from moec.compiler.kernels.linear_shape import padded
from moec.formats import format_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.compiler.kernels.emit import Buffer, Expr

BLOCK_THREADS = 256


@dataclass(frozen=True)
class Rounding:
    """How float32 activations become numbers of 16 bits.

    For quantized weights these are float16 of a sixteenth, which saturate beyond 1,048,064 and have three bits of
    mantissa more than bfloat16; the weights are dequantized to sixteen times their values then.
    """

    dtype: str
    """bfloat16 or float16."""
    quantized: bool = False

    @classmethod
    def of(cls, dtype: str, name: str | None = None) -> Rounding:
        """For weights of a type, or in the format called ``name``."""
        return cls(dtype) if format_of(name) is None else cls(TYPE, quantized=True)

    def scaled(self, number: Expr) -> Expr:
        """What is rounded for ``number``."""
        if not self.quantized:
            return number
        return cuda.value("float32", "clamp", number * T.float32(SPLIT.scale), T.float32(SPLIT.largest))


def emit_round(
    x: Buffer,
    rounded: Buffer,
    rows: Expr,
    columns: int,
    rounding: Rounding,
    terms: int = 1,
    *,
    panels: bool = False,
    beside: Callable[[Expr, int], None] | None = None,
) -> None:
    """Emit one launch: ``rounded[r, k] = x[r, k]`` to nearest even, zeros up to ``padded(columns)``.

    With two terms what the first leaves of x follows it in each row, rounded too.

    Args:
        x: float32 ``[rows, columns]``.
        rounded: 16-bit ``[rows, terms * padded(columns)]``, 16-byte aligned.
        rows: int64.
        columns: of a row.
        rounding: to what.
        terms: 1 or 2.
        panels: whether ``rounded`` is cut into panels, those of the second term behind those of the first; ``columns``
            is a multiple of 64.
        beside: emits what one more block does, given its thread's number and how many there are.
    """
    width = padded(columns) // CHUNK
    blocks = ceildiv(rows * i64(width), BLOCK_THREADS)
    with cuda.launch((blocks if beside is None else blocks + i64(1),), BLOCK_THREADS) as ((block,), thread):
        number = T.bind(i64(block) * i64(BLOCK_THREADS) + i64(thread))
        cuda.wait_previous()
        with when(number < rows * i64(width)):
            row, first = T.bind(div(number, width)), T.bind(mod(number, width) * i64(CHUNK))
            found = values_of_chunk(x, row * i64(columns), first, columns)
            values, dtype = [rounding.scaled(value) for value in found], rounding.dtype
            start = T.bind(row * i64(terms * padded(columns)) + first)
            for term in range(terms):
                words = [cuda.pack(dtype, *values[k : k + 2]) for k in range(0, CHUNK, 2)]
                place = start + i64(term * padded(columns))
                if panels:
                    place = term_in_panels(row, i32(first), term, columns, rows)
                cuda.call("store_16", cuda.element(rounded, place), *words)
                values = [value - seen for value, seen in zip(values, _floats(dtype, words), strict=True)]
        if beside is not None:
            with when(i64(block) == blocks):
                beside(thread, BLOCK_THREADS)
        cuda.launch_next()


def term_in_panels(row: Expr, column: Expr, term: int, columns: int, rows: Expr) -> Expr:
    """Where a column (int32) of a term of a row (int64) lies, the panels of each of its terms behind one another."""
    return panel_element(row, column + i32(term * columns), rows, i32(mod(row, PANEL_PIECES)))


def _floats(dtype: str, words: list[Expr]) -> list[Expr]:
    return [value for word in words for value in cuda.unpack(dtype, word)]


def values_of_chunk(x: Buffer, start: Expr, first: Expr, columns: int) -> list[Expr]:
    """A chunk of a row as float32."""
    if columns % CHUNK == 0:
        words = cuda.registers(CHUNK, "uint32")
        for half in (0, 4):
            cuda.call("load_16", cuda.element(words, half), cuda.element(x, start + first + i64(half)))
        return [T.reinterpret("float32", load(words, k)) for k in range(CHUNK)]
    values = cuda.registers(CHUNK)
    for k in range(CHUNK):
        store(values, k, T.float32(0))
        with when(first + i64(k) < i64(columns)):
            store(values, k, load(x, start + first + i64(k)))
    return [load(values, k) for k in range(CHUNK)]
