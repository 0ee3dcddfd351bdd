"""``y[.., t, n] = sum_k x[.., t, k] * w[.., n, k] (+ b[.., n])`` for more than a few tokens: round, then multiply."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.compiler.kernels.cpu.emit import Argument, arguments, build, i64, symbol
from moec.compiler.kernels.cuda.gemm import Operand, Product, emit_product, padded, store_float32
from moec.compiler.kernels.cuda.rounding import emit_round

if TYPE_CHECKING:
    from tvm import tirx

    from moec.compiler.kernels.cpu.emit import Buffer


def emit_linear_many(
    product: Product, x: Buffer, weight: Buffer, bias: Buffer | None, rounded: Buffer, out: Buffer
) -> None:
    """Emit the launches; tensors are contiguous, with the batch outermost.

    Args:
        product: sizes; the type is that of ``weight``.
        x: float32 ``[batch, T, K]``.
        weight: ``[batch, N, K]``.
        bias: float32 ``[batch, N]``.
        rounded: scratch ``[batch, T, padded(K)]`` of the weight's type.
        out: float32 ``[batch, T, N]``.
    """
    depth = padded(product.depth)
    emit_round(x, rounded, i64(product.batch) * product.tokens, product.depth, product.dtype)
    emit_product(
        product,
        Operand(rounded, depth, product.tokens * i64(depth)),
        Operand(weight, product.depth, product.rows * product.depth),
        store_float32(Operand(out, product.rows, product.tokens * i64(product.rows)), bias, product.rows),
    )


def linear_many(*, rows: int, columns: int, dtype: str, batch: int | None, bias: bool) -> tirx.PrimFunc:
    """The kernel ``linear_many(x, weight, [bias], rounded, out)``; shapes as in ``emit_linear_many``.

    Without a batch (``None``) the tensors have no such dimension.
    """
    lead = () if batch is None else (batch,)

    def body() -> None:
        tokens = symbol("T")
        x, weight, offset, rounded, out = arguments(
            Argument("x", (*lead, tokens, columns), "float32"),
            Argument("weight", (*lead, rows, columns), dtype),
            Argument("bias", (*lead, rows), "float32") if bias else None,
            Argument("rounded", (*lead, tokens, padded(columns)), dtype),
            Argument("out", (*lead, tokens, rows), "float32"),
        )
        product = Product(tokens, rows, columns, dtype, batch or 1)
        emit_linear_many(product, x, weight, offset, rounded, out)

    return build("linear_many", body)
