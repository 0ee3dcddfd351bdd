"""Products of the dense segments: several weights with one input, which the kernel may compute itself.

At most eight tokens take the way of ``linear_few``: one launch, every block computes the input that it needs. More
tokens take tensor cores: the input is rounded to the weights' type once, then one launch for each weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cpu.emit import Argument, Buffer, Expr, arguments, build, either, i64, symbol
from moec.compiler.kernels.cuda import primitives as gpu
from moec.compiler.kernels.cuda.few_tiling import FEW_TOKENS
from moec.compiler.kernels.cuda.gemm import Operand, emit_product, padded, store_float32
from moec.compiler.kernels.cuda.gemm import Product as Sizes
from moec.compiler.kernels.cuda.linear_few import FewGroup, emit_linear_few, read_rows, store_rows
from moec.compiler.kernels.cuda.linear_plain import emit_plain
from moec.compiler.kernels.cuda.primitives import i32
from moec.compiler.kernels.cuda.rounding import emit_round
from moec.compiler.kernels.cuda.row_values import split_place
from moec.compiler.kernels.cuda.rows import Place, RowBlock
from moec.compiler.kernels.cuda.threads import write

if TYPE_CHECKING:
    from tvm import tirx

    from moec.compiler.kernels.cuda.few_tokens import Block, Prologue, Reader
    from moec.compiler.lowering.passes.dispatch_linear import LinearShape
    from moec.compiler.lowering.passes.fuse_rows import Product

ROUND_THREADS = 256


def declare(shape: LinearShape) -> tirx.PrimFunc:
    """A kernel that does nothing, which stands for a product until it is known what it is fused with."""
    lead = () if shape.batch is None else (shape.batch,)

    def body() -> None:
        tokens = symbol("T")
        arguments(
            Argument("x", (*lead, tokens, shape.columns), "float32"),
            Argument("weight", (*lead, shape.rows, shape.columns), shape.dtype),
            Argument("bias", (*lead, shape.rows), "float32") if shape.bias else None,
            Argument("out", (*lead, tokens, shape.rows), "float32"),
        )
        T.evaluate(i32(0))

    return build("linear", body)


def product(item: Product) -> tirx.PrimFunc:
    """The kernel ``(inputs..., (weight, [bias])..., [rounded], outputs...)``; T is symbolic.

    ``inputs`` are those of the region that makes the input, or the input itself, float32 ``[.., T, K]``; ``rounded``,
    16-bit ``[.., T, K up to a multiple of 8]``, is scratch, and is not there where weights are float32.
    """

    def body() -> None:
        tokens = symbol("T")
        _Product(item, tokens).emit()

    return build("product", body)


@dataclass(frozen=True)
class _Weight:
    shape: LinearShape
    matrix: Buffer
    bias: Buffer | None
    out: Buffer


class _Product:
    """A kernel while it is emitted."""

    def __init__(self, item: Product, tokens: Expr) -> None:
        self.item, self.tokens = item, tokens
        first = item.shapes[0]
        self.columns, self.dtype, self.batch = first.columns, first.dtype, first.batch or 1
        lead = () if first.batch is None else (first.batch,)
        keys = item.region.inputs if item.region else (item.source,)
        inputs = [self._input(number, key, lead) for number, key in enumerate(keys)]
        declared: list[Argument | None] = [*inputs]
        for shape in item.shapes:
            declared.append(Argument("weight", (*lead, shape.rows, shape.columns), shape.dtype))
            declared.append(Argument("bias", (*lead, shape.rows), "float32") if shape.bias else None)
        rounded = Argument("rounded", (*lead, tokens, padded(self.columns)), self.dtype)
        declared.append(rounded if self.dtype != "float32" else None)
        declared += [Argument("out", (*lead, tokens, shape.rows), "float32") for shape in item.shapes]
        buffers = arguments(*declared)
        self.inputs = dict(zip(keys, buffers, strict=False))
        rest, count = buffers[len(keys) :], len(item.shapes)
        self.rounded = rest[2 * count]
        self.weights = [
            _Weight(shape, rest[2 * number], rest[2 * number + 1], rest[2 * count + 1 + number])
            for number, shape in enumerate(item.shapes)
        ]

    def _input(self, number: int, key: object, lead: tuple[int, ...]) -> Argument:
        if self.item.region is None:
            return Argument("x", (*lead, self.tokens, self.columns), "float32")
        tensor = self.item.region.tensors[key]
        shape = tuple(self.tokens if extent is None else extent for extent in tensor.shape)
        return Argument(f"a{number}", shape, tensor.dtype)

    def emit(self) -> None:
        """Both ways, and the choice between them on the host."""
        either(self.tokens <= i64(FEW_TOKENS), self._few, self._many)

    def _line(self, token: Expr, batch: Expr) -> Expr:
        """Row of an input or a result: matrices of a batch one after the other."""
        return T.cast(batch, "int64") * self.tokens + T.cast(token, "int64")

    def _few(self) -> None:
        rows = tuple(weight.shape.rows for weight in self.weights)
        group = FewGroup(rows, self.columns, self.dtype, self.batch)
        epilogue = store_rows(
            [weight.out for weight in self.weights],
            [weight.bias for weight in self.weights],
            rows,
            lambda number, batch, token, row: (
                self._line(token, batch) * i64(rows[number]) + T.cast(row, "int64")
            ),
        )
        emit_linear_few(
            group, [weight.matrix for weight in self.weights], self.tokens, self._prologue(), epilogue
        )

    def _prologue(self) -> Prologue:
        if self.item.region is None:
            x = self.inputs[self.item.source]
            return read_rows(x, lambda token, batch: self._line(token, batch) * i64(self.columns))
        return self._computed

    def _computed(self, block: Block) -> Reader:
        """The prologue that computes every activation where it is read."""
        region = self.item.region
        assert region is not None

        def read_at(token: Expr, column: Expr, count: int) -> list[Expr]:
            row = RowBlock(region, self.inputs, self.tokens, Place(token), block.thread, block.threads)
            start = column if self.batch == 1 else T.bind(block.batch * i32(self.columns) + column)
            return [T.bind(self._activation(row, start + i32(number), token)) for number in range(count)]

        return read_at

    def _activation(self, row: RowBlock, place: Expr, token: Expr) -> Expr:
        tensor = row.region.tensors[self.item.source]
        return row.element(self.item.source, split_place(tensor, place, token))

    def _many(self) -> None:
        if self.dtype == "float32":
            for weight in self.weights:
                x = self.inputs[self.item.source]
                emit_plain(weight.shape, self.tokens, x, weight.matrix, weight.bias, weight.out)
            return
        depth = padded(self.columns)
        if self.item.region is None:
            x = self.inputs[self.item.source]
            emit_round(x, self.rounded, i64(self.batch) * self.tokens, self.columns, self.dtype)
        else:
            self._round_computed(depth)
        for weight in self.weights:
            rows = weight.shape.rows
            emit_product(
                Sizes(self.tokens, rows, self.columns, self.dtype, self.batch),
                Operand(self.rounded, depth, self.tokens * i64(depth)),
                Operand(weight.matrix, self.columns, rows * self.columns),
                store_float32(Operand(weight.out, rows, self.tokens * i64(rows)), weight.bias, rows),
            )

    def _round_computed(self, depth: int) -> None:
        """A launch with a block a token: its activations, computed and rounded."""
        region = self.item.region
        assert region is not None
        count = math.prod(region.tensors[self.item.source].row)
        with gpu.launch((self.tokens,), ROUND_THREADS) as ((token,), thread):
            gpu.launch_next()
            gpu.wait_previous()
            row = RowBlock(region, self.inputs, self.tokens, Place(token), thread, ROUND_THREADS)

            def one(place: Expr) -> None:
                batch, column = T.truncdiv(place, i32(self.columns)), T.truncmod(place, i32(self.columns))
                target = self._line(token, batch) * i64(depth) + i64(column)
                write(self.rounded, self.dtype, target, T.bind(self._activation(row, place, token)))

            row.each(count, one)
