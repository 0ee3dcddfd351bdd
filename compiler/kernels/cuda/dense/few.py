"""``y[t, n] = sum_k x[t, k] * w[n, k]`` for at most eight tokens: several weights that share their input in one launch.

What a block multiplies by comes from a *prologue*, a callback that says how to read activations, and what becomes of
a result is up to an *epilogue*: other operations are fused through them. Weights of 16 bits and quantized ones whose
columns are a multiple of 8 go through tensor cores, the activations split into two numbers of 16 bits each. All others
take a slower way, one warp a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.dense.few_block import FewProduct, memory_for
from moec.compiler.kernels.cuda.few.lanes import quotient, remainder
from moec.compiler.kernels.cuda.few.tiling import LANES
from moec.compiler.kernels.cuda.few.tokens import Block, read_floats
from moec.compiler.kernels.cuda.packed.element import read_element
from moec.compiler.kernels.cuda.primitives import blocks_at_once, i32, launch, registers, warp_sum
from moec.compiler.kernels.emit import either, load, store, when

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.compiler.kernels.cuda.dense.few_group import Epilogue
    from moec.compiler.kernels.cuda.few.tokens import Prologue, Reader
    from moec.compiler.kernels.emit import Buffer, Expr

SLOW_WARPS = 8
"""Rows that a block takes at once where tensor cores are of no use."""


def emit_linear_few(product: FewProduct) -> None:
    """Emit the launch that multiplies all weights of a group."""
    group = product.group
    if group.on_tensor_cores:
        with launch((product.blocks, group.batch), product.tiling.threads) as ((block, batch), thread):
            blocks_at_once(product.tiling.blocks)
            product.emit(block, batch, thread)
        return
    for number in range(len(product.weights)):
        _emit_slow(product, number)


def emit_linears_few(products: list[FewProduct], reserve: Callable[[], None] | None = None) -> None:
    """Emit one launch for products whose blocks have as many threads, those of the first one in front.

    Args:
        products: of one matrix each, on tensor cores.
        reserve: emits shared memory that all prologues use.
    """
    if len(products) == 1:
        emit_linear_few(products[0])
        return
    first, second = products
    with launch((first.blocks + second.blocks,), first.tiling.threads) as ((block,), thread):
        blocks_at_once(min(product.tiling.blocks for product in products))
        if reserve is not None:
            reserve()
        most = max(product.most for product in products)
        else_bytes = max(product.prologue_bytes for product in products)
        memory = memory_for(*(each.room for each in products), else_bytes=else_bytes, most=most)
        either(
            block < i32(first.blocks),
            lambda: first.emit(block, i32(0), thread, memory),
            lambda: second.emit(T.bind(block - i32(first.blocks)), i32(0), thread, memory),
        )


def _emit_slow(product: FewProduct, number: int) -> None:
    group, weight = product.group, product.weights[number]
    rows, columns = group.rows[number], group.columns
    threads = SLOW_WARPS * LANES
    with launch((-(-rows // SLOW_WARPS), group.batch), threads) as ((block, batch), thread):
        count = T.bind(T.cast(product.tokens, "int32"))
        reader = product.prologue(Block(thread, threads, count, columns, batch, block))
        row = T.bind(block * i32(SLOW_WARPS) + quotient(thread, LANES))
        lane = T.bind(remainder(thread, LANES))
        with when(row < i32(rows)), T.serial(i32(0), count) as token:
            line = T.bind(T.cast(batch, "int64") * T.int64(rows) + T.cast(row, "int64"))
            total = registers(1)
            store(total, i32(0), T.float32(0))
            with T.serial(i32(0), i32(-(-columns // LANES))) as step:
                column = T.bind(step * i32(LANES) + lane)
                with when(column < i32(columns)):
                    (left,) = reader(token, column, 1)
                    right = read_element(weight, group.dtype, columns, line, column)
                    store(total, i32(0), load(total, i32(0)) + left * right)
            summed = warp_sum(load(total, i32(0)))
            with when(lane == i32(0)):
                product.epilogue(number, batch, token, row, summed)


def read_rows(x: Buffer, place: Callable[[Expr, Expr], Expr]) -> Prologue:
    """The prologue that takes activations as they are.

    Args:
        x: float32.
        place: where a token's first activation lies, in elements (int64), given the token and the number in a
            batch, int32; a multiple of 4.
    """

    def prologue(block: Block) -> Reader:
        block.wait()

        def read_at(token: Expr, column: Expr, count: int) -> list[Expr]:
            start = place(token, block.batch)
            return read_floats(x, T.bind(start + T.cast(column, "int64")), count)

        return read_at

    return prologue


def store_rows(
    outputs: list[Buffer],
    biases: list[Buffer | None],
    rows: tuple[int, ...],
    place: Callable[[int, Expr, Expr, Expr], Expr],
) -> Epilogue:
    """The epilogue that adds a bias where there is one and stores float32.

    Args:
        outputs: one for each weight of a group.
        biases: float32 ``[batch, rows]``, or ``None``.
        rows: of each weight.
        place: ``(number in the group, batch, token, row)`` to the element (int64) of that output.
    """

    def epilogue(number: int, batch: Expr, token: Expr, row: Expr, total: Expr) -> None:
        bias = biases[number]
        if bias is not None:
            total = total + load(bias, T.cast(batch * i32(rows[number]) + row, "int64"))
        store(outputs[number], place(number, batch, token, row), total)

    return epilogue
