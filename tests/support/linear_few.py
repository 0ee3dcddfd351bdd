"""``y[.., t, n] = sum_k x[.., t, k] * w[.., n, k] (+ b[.., n])``: the weight products of the dense segments."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T  # noqa: N812

from moec.compiler.kernels.cpu.emit import (
    Argument,
    arguments,
    build,
    div,
    either,
    i64,
    load,
    loop,
    mod,
    store,
    symbol,
)
from moec.compiler.kernels.cuda.few_tiling import FEW_TOKENS
from moec.compiler.kernels.cuda.linear_few import FewGroup, emit_linear_few, read_rows, store_rows
from moec.compiler.kernels.cuda.threads import read, registers, threads

if TYPE_CHECKING:
    from tvm import tirx

    from moec.compiler.kernels.cpu.emit import Buffer, Expr


def linear(*, rows: int, columns: int, dtype: str, batch: int | None, bias: bool) -> tirx.PrimFunc:
    """The kernel ``linear(x, weight, [bias], out)``; shapes as in ``kernels/cpu/linear.py``."""
    lead = () if batch is None else (batch,)
    group = FewGroup((rows,), columns, dtype, batch or 1)

    def body() -> None:
        tokens = symbol("T")
        x, weight, offset, out = arguments(
            Argument("x", (*lead, tokens, columns), "float32"),
            Argument("weight", (*lead, rows, columns), dtype),
            Argument("bias", (*lead, rows), "float32") if bias else None,
            Argument("out", (*lead, tokens, rows), "float32"),
        )

        def line(token: Expr, batch: Expr) -> Expr:
            return T.cast(batch, "int64") * tokens + T.cast(token, "int64")

        def few() -> None:
            prologue = read_rows(x, lambda token, number: line(token, number) * i64(columns))
            epilogue = store_rows(
                [out],
                [offset],
                (rows,),
                lambda _, number, token, row: line(token, number) * i64(rows) + T.cast(row, "int64"),
            )
            emit_linear_few(group, [weight], tokens, prologue, epilogue)

        either(tokens <= i64(FEW_TOKENS), few, lambda: _many(group, tokens, x, weight, offset, out))

    return build("linear", body)


def _many(
    group: FewGroup, tokens: Expr, x: Buffer, weight: Buffer, offset: Buffer | None, out: Buffer
) -> None:
    (rows,), columns, dtype = group.rows, group.columns, group.dtype
    with threads(i64(group.batch * rows) * tokens) as number:
        row, token = T.bind(mod(number, rows)), T.bind(div(number, rows))
        weight_row = T.bind(div(token, tokens) * i64(rows) + row)
        total = registers(1)
        store(total, 0, T.float32(0) if offset is None else load(offset, weight_row))
        with loop(columns) as k:
            left = load(x, token * i64(columns) + k)
            store(total, 0, load(total, 0) + left * read(weight, dtype, weight_row * i64(columns) + k))
        store(out, number, load(total, 0))
