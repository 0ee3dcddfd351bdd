"""Products of the dense segments: several weights with one input, which the kernel may compute itself.

At most eight tokens take the way of ``few.py``: one launch, every block computes the input that it needs. More
tokens take tensor cores: the input is rounded to the weights' type once, then one launch for each weight.

Where others want the input too, or it takes a sum over the row (a norm), every block computes all of it for a step of
one token, and the first block keeps it for the others; for more tokens a launch of its own does that before. A region
behind a product, such as a router's choice, is computed by the last of the blocks that it waits for, for one token, and
by a launch of its own for more.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.dense.few import emit_linear_few, emit_linears_few, read_rows, store_rows
from moec.compiler.kernels.cuda.dense.few_block import FewProduct, LastBlock
from moec.compiler.kernels.cuda.dense.few_group import FewGroup
from moec.compiler.kernels.cuda.dense.input import ProductInput
from moec.compiler.kernels.cuda.dense.kept_region import KeptRegion
from moec.compiler.kernels.cuda.dense.many import ManyProduct
from moec.compiler.kernels.cuda.dense.parameters import operands_of, parameters
from moec.compiler.kernels.cuda.few.tiling import FEW_TOKENS
from moec.compiler.kernels.cuda.many.tiles import CHUNK
from moec.compiler.kernels.cuda.primitives import LANES, i32
from moec.compiler.kernels.cuda.rows.block import Place, RowBlock
from moec.compiler.kernels.cuda.rows.kernel import emit_rows
from moec.compiler.kernels.emit import Buffer, Expr, arguments, build, either, i64, symbol
from moec.formats import format_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tvm import tirx

    from moec.compiler.kernels.cuda.few.tokens import Block, Prologue, Reader
    from moec.compiler.kernels.rows.product import Behind, Product
    from moec.compiler.kernels.rows.region import Region

ON_HOPPER = "moec.on_hopper"
"""Attribute of a kernel: the one that takes its place on Hopper GPUs."""


def product(item: Product, *, hopper: bool = False) -> tirx.PrimFunc:
    """The kernel ``(inputs..., (weight, [bias])..., [rounded], kept..., outputs...)``; T is symbolic.

    ``inputs`` are those of the region that makes the input, or the input itself, float32 ``[.., T, K]``; ``rounded``,
    16-bit ``[.., T, rounded_columns]``, is scratch or given, and is not there where weights are float32; behind it may
    follow the next product's, written instead of some results where tokens are many (`Activation`); ``kept`` are the
    region's outputs where the product keeps them. With ``hopper`` it is the kernel for Hopper GPUs. Where a region is
    behind the product, what else it reads follows ``inputs``, and what it makes ``kept``.
    """

    def body() -> None:
        tokens = symbol("T")
        buffers = arguments(*parameters(item, tokens))
        ProductKernel(item, tokens, buffers, hopper=hopper).emit()

    return build("product", body)


def product_and_hopper(item: Product) -> tirx.PrimFunc:
    """The kernel for all GPUs, with that for Hopper GPUs as an attribute."""
    first = item.shapes[0]
    if first.dtype == "float32" or (first.columns % CHUNK and format_of(first.dtype) is None):
        return product(item)
    return product(item).with_attr(ON_HOPPER, product(item, hopper=True))


def few_group(item: Product) -> FewGroup:
    """What the kernel multiplies where there are few tokens."""
    first = item.shapes[0]
    return FewGroup(tuple(shape.rows for shape in item.shapes), first.columns, first.dtype, first.batch or 1)


class ProductKernel:
    """A kernel while it is emitted.

    Args:
        item: what it multiplies.
        tokens: T, a host value (int64).
        buffers: one for each of ``parameters``.
        hopper: whether for Hopper GPUs alone.
    """

    def __init__(self, item: Product, tokens: Expr, buffers: Sequence[Any], *, hopper: bool = False) -> None:
        self.item, self.tokens = item, tokens
        first, given = item.shapes[0], operands_of(item, buffers)
        self.columns, self.batch = first.columns, first.batch or 1
        self.rows, self.weights = given.rows, given.weights
        self.input = ProductInput(item, tokens, given.rows)
        self.many = ManyProduct(self.input, given, hopper=hopper)
        self.beside: ProductKernel | None = None
        if item.beside is not None:
            self.beside = ProductKernel(item.beside, tokens, given.beside, hopper=hopper)

    def emit(self) -> None:
        """Every way, and the choice between them on the host."""
        region = self.item.region
        if region is None or not self.item.keeps:
            either(self.tokens <= i64(FEW_TOKENS), lambda: emit_linear_few(self.few()), self.many.emit)
            return

        behind = self.item.behind

        def few() -> None:
            emit_rows(region, self.rows, self.tokens)
            self._emit_few(self._few_parts())

        def several() -> None:
            either(self.tokens <= i64(FEW_TOKENS), few, lambda: self._many_parts(region))
            if behind is not None:
                emit_rows(behind.region, self._rows_behind(behind), self.tokens)

        either(self.tokens == i64(1), lambda: self._emit_alone(region), several)

    def _few_parts(self) -> list[FewProduct]:
        """The product of at most eight tokens and the one beside it, in blocks of as many warps where that can be."""
        if self.beside is None:
            return [self.few()]
        beside = self.beside.few()
        try:
            return [self.few(beside.tiling.threads // LANES), beside]
        except ValueError:
            return [self.few(), beside]

    def _emit_few(self, parts: list[FewProduct], kept: KeptRegion | None = None) -> None:
        if len({part.tiling.threads for part in parts}) == 1:
            emit_linears_few(parts, kept.reserve if kept is not None else None)
            return
        for part in parts:
            emit_linear_few(part)

    def _many_parts(self, region: Region) -> None:
        """The region, which rounds what it makes of the input for all products that want it so, then these."""
        parts = [self.many, *([] if self.beside is None else [self.beside.many])]
        rounding = [part for part in parts if part.rounds_itself]
        rows = dict(self.rows)
        if self.item.alone and len(rounding) == len(parts):
            del rows[self.item.source]

        def put(token: Expr, place: Expr, value: Expr) -> None:
            for part in rounding:
                part.put(token, place, value)

        emit_rows(region, rows, self.tokens, {self.item.source: put})
        for part in parts:
            part.emit(rounded=True)

    def _emit_alone(self, region: Region) -> None:
        """The products of the only token, with the regions before and behind them."""
        behind, kept = self.item.behind, KeptRegion(region, self.rows, self.tokens, self.item.source)
        first, *others = (
            replace(
                part, prologue=kept.prologue(writes=number == 0), most=1, prologue_bytes=region.shared_bytes
            )
            for number, part in enumerate(self._few_parts())
        )
        if behind is None:
            self._emit_few([first, *others], kept)
            return

        def emit(thread: Expr, threads: int) -> None:
            rows = self._rows_behind(behind)
            RowBlock(behind.region, rows, self.tokens, Place(i32(0)), thread, threads).emit()

        last = LastBlock(len(behind.results), emit)
        bytes_ = region.shared_bytes + behind.region.shared_bytes
        self._emit_few([replace(first, last=last, prologue_bytes=bytes_), *others], kept)

    def _rows_behind(self, behind: Behind) -> dict[Any, Buffer]:
        """The tensors of the region behind the product."""
        return self.rows | {
            key: weight.out for key, weight in zip(behind.results, self.weights, strict=False)
        }

    def few(self, warps: int | None = None) -> FewProduct:
        """The product of at most eight tokens, whose input each block computes or reads; see `FewGroup.tiling`."""
        group = few_group(self.item)
        rows = group.rows
        epilogue = store_rows(
            [weight.out for weight in self.weights],
            [weight.bias for weight in self.weights],
            rows,
            lambda number, batch, token, row: (
                self.input.line(token, batch) * i64(rows[number]) + T.cast(row, "int64")
            ),
        )
        matrices = [weight.matrix for weight in self.weights]
        return FewProduct(group, matrices, self.tokens, self._prologue(), epilogue, group.tiling(warps))

    def _prologue(self) -> Prologue:
        if not self.input.in_memory:
            return self._computed
        x = self.input.memory
        return read_rows(x, lambda token, batch: self.input.line(token, batch) * i64(self.columns))

    def _computed(self, block: Block) -> Reader:
        """The prologue that computes every activation where it is read."""
        region = self.item.region
        assert region is not None
        block.wait()

        def read_at(token: Expr, column: Expr, count: int) -> list[Expr]:
            row = RowBlock(region, self.rows, self.tokens, Place(token), block.thread, block.threads)
            start = column if self.batch == 1 else T.bind(block.batch * i32(self.columns) + column)
            return [T.bind(self.input.element(row, start + i32(number), token)) for number in range(count)]

        return read_at
