"""``y[.., t, n] = sum_k x[.., t, k] * w[.., n, k] (+ b[.., n])`` one thread a result: for float32 weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.threads import read, registers, threads
from moec.compiler.kernels.emit import Buffer, Expr, div, i64, load, loop, mod, store

if TYPE_CHECKING:
    from moec.compiler.kernels.linear_shape import LinearShape


def emit_plain(
    shape: LinearShape, tokens: Expr, x: Buffer, weight: Buffer, bias: Buffer | None, out: Buffer
) -> None:
    """Emit one launch.

    Args:
        shape: N rows, K columns, and a batch B where there is one.
        tokens: T, int64.
        x: float32 ``[.., T, K]``.
        weight: ``[.., N, K]`` of the shape's dtype.
        bias: float32 ``[.., N]`` or ``None``.
        out: float32 ``[.., T, N]``.
    """
    rows, columns = shape.rows, shape.columns
    with threads(i64((shape.batch or 1) * rows) * tokens) as number:
        row, token = T.bind(mod(number, rows)), T.bind(div(number, rows))
        weight_row = T.bind(div(token, tokens) * i64(rows) + row)
        total = registers(1)
        store(total, 0, T.float32(0) if bias is None else load(bias, weight_row))
        with loop(columns) as k:
            left = load(x, token * i64(columns) + k)
            store(total, 0, load(total, 0) + left * read(weight, shape.dtype, weight_row * i64(columns) + k))
        store(out, number, load(total, 0))
