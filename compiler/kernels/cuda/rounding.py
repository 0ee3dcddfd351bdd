"""Float32 activations rounded to a 16-bit type: what tensor cores take as their left operand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cpu.emit import ceildiv, div, i64, load, mod, store, when
from moec.compiler.kernels.cuda import primitives as cuda
from moec.compiler.kernels.cuda.gemm import padded
from moec.compiler.kernels.cuda.tiles import CHUNK

if TYPE_CHECKING:
    from moec.compiler.kernels.cpu.emit import Buffer, Expr

BLOCK_THREADS = 256


def emit_round(x: Buffer, rounded: Buffer, rows: Expr, columns: int, dtype: str, terms: int = 1) -> None:
    """Emit one launch: ``rounded[r, k] = x[r, k]`` to nearest even, zeros up to ``padded(columns)``.

    With two terms what the first leaves of x follows it in each row, rounded too.

    Args:
        x: float32 ``[rows, columns]``.
        rounded: 16-bit ``[rows, terms * padded(columns)]``, 16-byte aligned.
        rows: int64.
        columns: of a row.
        dtype: ``bfloat16`` or ``float16``.
        terms: 1 or 2.
    """
    width = padded(columns) // CHUNK
    blocks = ceildiv(rows * i64(width), BLOCK_THREADS)
    with cuda.launch((blocks,), BLOCK_THREADS) as ((block,), thread):
        number = T.bind(i64(block) * i64(BLOCK_THREADS) + i64(thread))
        cuda.wait_previous()
        with when(number < rows * i64(width)):
            row, first = T.bind(div(number, width)), T.bind(mod(number, width) * i64(CHUNK))
            values = _values(x, row * i64(columns), first, columns)
            start = T.bind(row * i64(terms * padded(columns)) + first)
            for term in range(terms):
                words = [cuda.pack(dtype, *values[k : k + 2]) for k in range(0, CHUNK, 2)]
                place = start + i64(term * padded(columns))
                cuda.call("store_16", cuda.element(rounded, place), *words)
                values = [value - seen for value, seen in zip(values, _floats(dtype, words), strict=True)]
        cuda.launch_next()


def _floats(dtype: str, words: list[Expr]) -> list[Expr]:
    return [value for word in words for value in cuda.unpack(dtype, word)]


def _values(x: Buffer, start: Expr, first: Expr, columns: int) -> list[Expr]:
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
