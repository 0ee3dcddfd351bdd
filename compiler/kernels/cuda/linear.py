"""``y[.., t, n] = sum_k x[.., t, k] * w[.., n, k] (+ b[.., n])``: the weight products of the dense segments."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.compiler.kernels.cpu.emit import Argument, arguments, build, i64, symbol
from moec.compiler.kernels.cuda.gemm import Operand, Product, emit_product, padded, store_float32
from moec.compiler.kernels.cuda.linear_plain import linear_plain
from moec.compiler.kernels.cuda.rounding import emit_round

if TYPE_CHECKING:
    from tvm import tirx


def linear(*, rows: int, columns: int, dtype: str, batch: int | None, bias: bool) -> tirx.PrimFunc:
    """The kernel ``linear(x, weight, [bias], out)``; shapes as in ``kernels/cpu/linear.py``."""
    return linear_plain(rows=rows, columns=columns, dtype=dtype, batch=batch, bias=bias)


def linear_many(*, rows: int, columns: int, dtype: str, batch: int | None, bias: bool) -> tirx.PrimFunc:
    """The kernel ``linear_many(x, weight, [bias], rounded, out)`` for more than a few tokens, on tensor cores.

    ``rounded [.., T, padded(columns)]``, of the weight's 16-bit type, is scratch. All else as in ``linear``.
    """
    lead = () if batch is None else (batch,)
    depth = padded(columns)

    def body() -> None:
        tokens = symbol("T")
        x, weight, offset, rounded, out = arguments(
            Argument("x", (*lead, tokens, columns), "float32"),
            Argument("weight", (*lead, rows, columns), dtype),
            Argument("bias", (*lead, rows), "float32") if bias else None,
            Argument("rounded", (*lead, tokens, depth), dtype),
            Argument("out", (*lead, tokens, rows), "float32"),
        )
        count = batch or 1
        emit_round(x, rounded, i64(count) * tokens, columns, dtype)
        emit_product(
            Product(tokens, rows, columns, dtype, count),
            Operand(rounded, depth, tokens * i64(depth)),
            Operand(weight, columns, rows * columns),
            store_float32(Operand(out, rows, tokens * i64(rows)), offset, rows),
        )

    return build("linear_many", body)
