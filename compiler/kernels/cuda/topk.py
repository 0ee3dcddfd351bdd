"""The K largest of each row, in falling order, ties by rising index."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cpu.emit import (
    Argument,
    Buffer,
    Expr,
    arguments,
    build,
    i64,
    load,
    loop,
    store,
    symbol,
    when,
)
from moec.compiler.kernels.cuda.threads import read, registers, threads, write

if TYPE_CHECKING:
    from tvm import tirx


def topk(*, entries: int, count: int, dtype: str) -> tirx.PrimFunc:
    """The kernel ``topk(x [R, entries], values [R, count], indices [R, count] int64)``; R is symbolic."""

    def body() -> None:
        rows = symbol("R")
        x, values, indices = arguments(
            Argument("x", (rows, entries), dtype),
            Argument("values", (rows, count), dtype),
            Argument("indices", (rows, count), "int64"),
        )
        with threads(rows) as row:
            best, chosen = registers(count), registers(count, "int64")
            for first, last in ((0, count), (count, entries)):
                with loop(last - first) as step:
                    entry = T.bind(step + i64(first))
                    value = T.bind(read(x, dtype, row * i64(entries) + entry))
                    place = entry if first == 0 else i64(count - 1)
                    with when(T.bool(True) if first == 0 else value > load(best, i64(count - 1))):
                        _insert(best, chosen, value, entry, place, count)
            with loop(count) as k:
                write(values, dtype, row * i64(count) + k, load(best, k))
                store(indices, row * i64(count) + k, load(chosen, k))

    return build("topk", body)


def _insert(best: Buffer, chosen: Buffer, value: Expr, entry: Expr, place: Expr, count: int) -> None:
    """Put the entry at ``place`` and let it rise past every smaller one."""
    store(best, place, value)
    store(chosen, place, entry)
    with loop(count - 1) as step:
        lower = T.bind(place - step)
        with when(lower > i64(0)), when(value > load(best, lower - i64(1))):
            store(best, lower, load(best, lower - i64(1)))
            store(chosen, lower, load(chosen, lower - i64(1)))
            store(best, lower - i64(1), value)
            store(chosen, lower - i64(1), entry)
