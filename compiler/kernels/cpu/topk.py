"""The K largest of each row, in falling order, ties by rising index: what routers choose their experts with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cpu.machine import Machine
from moec.compiler.kernels.cpu.numeric import narrow_store, widen
from moec.compiler.kernels.emit import (
    Argument,
    Buffer,
    Expr,
    arguments,
    build,
    either,
    i64,
    keep,
    load,
    loop,
    registers,
    store,
    symbol,
    when,
)

if TYPE_CHECKING:
    from tvm import tirx

PARALLEL_ENTRIES = 1 << 15
"""Below this many entries in all rows, one thread is faster than waking others."""


def topk(*, entries: int, count: int, dtype: str, lanes: int) -> tirx.PrimFunc:
    """The kernel ``topk(x [R, entries], values [R, count], indices [R, count] int64)``; R is symbolic.

    One pass over the row keeps the best ``count`` so far in order: an entry that is not among them, nearly all of
    them, costs one comparison.

    Args:
        entries: E, from 1.
        count: K, from 1 to E.
        dtype: of ``x`` and ``values``: ``bfloat16``, ``float16`` or ``float32``.
        lanes: float32 lanes of the target's vectors.
    """

    def body() -> None:
        rows = symbol("R")
        x, values, indices = arguments(
            Argument("x", (rows, entries), dtype),
            Argument("values", (rows, count), dtype),
            Argument("indices", (rows, count), "int64"),
        )

        selection = Selection(x, values, indices, entries, count, dtype, native_f16=Machine(lanes).native_f16)

        def every(parallel: bool) -> None:
            with loop(rows, parallel=parallel) as row:
                select_row(selection, row)

        either(rows * i64(entries) > i64(PARALLEL_ENTRIES), lambda: every(True), lambda: every(False))

    return build("topk", body)


@dataclass(frozen=True)
class Selection:
    """The tensors of a ``topk`` kernel, flat, and its sizes."""

    x: Buffer
    values: Buffer
    indices: Buffer
    entries: int
    count: int
    dtype: str
    native_f16: bool


def select_row(kernel: Selection, row: Expr) -> None:
    """Emit the selection for one row."""
    entries, count = kernel.entries, kernel.count
    best, chosen = registers(count), registers(count, "int64")
    for first, last in ((0, count), (count, entries)):
        with loop(last - first) as step:
            entry = T.bind(step + i64(first))
            place = row * i64(entries) + entry
            value = T.bind(widen(kernel.x, kernel.dtype, place, 1, native_f16=kernel.native_f16))
            if first == 0:
                _insert(best, chosen, value, entry, entry, count)
            else:
                with when(value > load(best, i64(count - 1))):
                    _insert(best, chosen, value, entry, i64(count - 1), count)
    with loop(count) as k:
        place = row * i64(count) + k
        narrow_store(kernel.values, kernel.dtype, place, load(best, k), 1, native_f16=kernel.native_f16)
        store(kernel.indices, place, load(chosen, k))


def _insert(best: Buffer, chosen: Buffer, value: Expr, entry: Expr, place: Expr, count: int) -> None:
    """Put the entry at ``place`` and let it rise past every smaller one."""
    store(best, place, value)
    store(chosen, place, entry)
    if count == 1:
        return
    with loop(count - 1) as step:
        lower = keep(place - step)
        with when(lower > i64(0)), when(value > load(best, lower - i64(1))):
            store(best, lower, load(best, lower - i64(1)))
            store(chosen, lower, load(chosen, lower - i64(1)))
            store(best, lower - i64(1), value)
            store(chosen, lower - i64(1), entry)
