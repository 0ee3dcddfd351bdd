"""The last launch of ``many.py``: the sum of each token's results, times their weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda import primitives as cuda
from moec.compiler.kernels.cuda.experts.results import values_of
from moec.compiler.kernels.cuda.primitives import i32
from moec.compiler.kernels.emit import ceildiv, div, i64, load, mod, store, when

if TYPE_CHECKING:
    from moec.artifacts.model import ExpertBody
    from moec.compiler.kernels.cuda.experts.call import ExpertCall
    from moec.compiler.kernels.cuda.experts.layout import Parts
    from moec.compiler.kernels.emit import Buffer, Expr

BLOCK_THREADS = 256
LANE_COLUMNS = 8
STORED = 4
"""Float32 numbers that are stored at once."""


def emit_combine(body: ExpertBody, call: ExpertCall, parts: Parts, first_column: Expr, width: int) -> None:
    """Emit ``out[t, first_column + n] = sum_k weight[t, k] * results[places[t*K + k], n]`` for a slice of columns.

    The sum is over the choices that are experts, in order; only columns of the result are written.
    """
    tokens, chosen = call.tokens, call.chosen
    total = tokens * i64(width // LANE_COLUMNS)
    with cuda.launch((ceildiv(total, BLOCK_THREADS),), BLOCK_THREADS) as ((block,), thread):
        number = T.bind(i64(block) * i64(BLOCK_THREADS) + i64(thread))
        token = T.bind(div(number, width // LANE_COLUMNS))
        column = T.bind(mod(number, width // LANE_COLUMNS) * i64(LANE_COLUMNS))
        cuda.wait_previous()
        with when(T.And(token < tokens, i64(first_column) + column < i64(body.hidden))):
            sums = cuda.registers(LANE_COLUMNS)
            for k in range(LANE_COLUMNS):
                store(sums, k, T.float32(0))
            with T.serial(i32(0), i32(chosen)) as choice:
                pair = T.bind(token * chosen + i64(choice))
                expert = T.bind(load(call.index, pair))
                with when(call.has(expert)):
                    factor, place = T.bind(load(call.weight, pair)), i64(load(parts.places, pair))
                    words = cuda.registers(LANE_COLUMNS // 2, "uint32")
                    source = cuda.element(parts.results, T.bind(place * i64(width) + column))
                    cuda.call("load_16", cuda.element(words, 0), source)
                    results = [value for k in range(LANE_COLUMNS // 2) for value in values_of(load(words, k))]
                    for k, result in enumerate(results):
                        store(sums, k, load(sums, k) + cuda.value("float32", "times", factor, result))
            _store(body.hidden, call.out, token, T.bind(i64(first_column) + column), sums)
        cuda.launch_next()


def _store(hidden: int, out: Buffer, token: Expr, column: Expr, sums: Buffer) -> None:
    place = T.bind(token * i64(hidden) + column)
    if hidden % LANE_COLUMNS == 0:
        for first in range(0, LANE_COLUMNS, STORED):
            words = [T.reinterpret("uint32", load(sums, first + k)) for k in range(STORED)]
            cuda.call("store_16", cuda.element(out, place + i64(first)), *words)
        return
    for k in range(LANE_COLUMNS):
        with when(column + i64(k) < i64(hidden)):
            store(out, place + i64(k), load(sums, k))
