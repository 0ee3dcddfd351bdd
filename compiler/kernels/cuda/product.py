"""Products of the dense segments: several weights with one input, which the kernel may compute itself.

At most eight tokens take the way of ``linear_few``: one launch, every block computes the input that it needs. More
tokens take tensor cores: the input is rounded to the weights' type once, then one launch for each weight.

Where others want the input too, or it takes a sum over the row (a norm), every block computes all of it for a step of
one token, and the first block keeps it for the others; for more tokens a launch of its own does that before. A region
behind a product, such as a router's choice, is computed by the last of the blocks that it waits for, for one token, and
by a launch of its own for more.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda import primitives as gpu
from moec.compiler.kernels.cuda.activated import emit_activated
from moec.compiler.kernels.cuda.few_group import FewGroup
from moec.compiler.kernels.cuda.few_product import FewProduct, LastBlock
from moec.compiler.kernels.cuda.few_tiling import FEW_TOKENS
from moec.compiler.kernels.cuda.gemm import Operand, Part, store_float32
from moec.compiler.kernels.cuda.gemm import Product as Sizes
from moec.compiler.kernels.cuda.gemm_tiles import emit_product
from moec.compiler.kernels.cuda.kept_region import KeptRegion
from moec.compiler.kernels.cuda.linear_few import emit_linear_few, emit_linears_few, read_rows, store_rows
from moec.compiler.kernels.cuda.linear_plain import emit_plain
from moec.compiler.kernels.cuda.panels import PANEL, PANEL_PIECES, panel_element
from moec.compiler.kernels.cuda.primitives import LANES, i32
from moec.compiler.kernels.cuda.product_parameters import Weight, operands_of, parameters
from moec.compiler.kernels.cuda.rounding import Rounding, emit_round
from moec.compiler.kernels.cuda.row_block import AT_ONCE, Place, RowBlock
from moec.compiler.kernels.cuda.row_values import split_place
from moec.compiler.kernels.cuda.rows import emit_rows
from moec.compiler.kernels.cuda.threads import write
from moec.compiler.kernels.cuda.tiles import CHUNK
from moec.compiler.kernels.emit import Buffer, Expr, arguments, build, either, i64, symbol
from moec.compiler.kernels.linear_shape import padded
from moec.formats import format_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tvm import tirx

    from moec.compiler.kernels.cuda.few_tokens import Block, Prologue, Reader
    from moec.compiler.kernels.rows.product import Behind, Product
    from moec.compiler.kernels.rows.region import Region

ROUND_THREADS = 256
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
        self.item, self.tokens, self.hopper = item, tokens, hopper
        first, given = item.shapes[0], operands_of(item, buffers)
        self.columns, self.dtype, self.batch = first.columns, first.dtype, first.batch or 1
        self.rounding = Rounding.of(first.dtype, first.dtype)
        self.rows, self.weights = given.rows, given.weights
        self.rounded, self.activated = given.rounded, given.activated
        self.beside: ProductKernel | None = None
        if item.beside is not None:
            self.beside = ProductKernel(item.beside, tokens, given.beside, hopper=hopper)

    def emit(self) -> None:
        """Every way, and the choice between them on the host."""
        region = self.item.region
        if region is None or not self.item.keeps:
            either(self.tokens <= i64(FEW_TOKENS), lambda: emit_linear_few(self.few()), self._many)
            return

        behind = self.item.behind

        def several() -> None:
            emit_rows(region, self.rows, self.tokens)
            either(
                self.tokens <= i64(FEW_TOKENS), lambda: self._emit_few(self._few_parts()), self._many_parts
            )
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

    def _many_parts(self) -> None:
        self._many()
        if self.beside is not None:
            self.beside._many()

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

    def _line(self, token: Expr, batch: Expr) -> Expr:
        """Row of an input or a result: matrices of a batch one after the other."""
        return T.cast(batch, "int64") * self.tokens + T.cast(token, "int64")

    def few(self, warps: int | None = None) -> FewProduct:
        """The product of at most eight tokens, whose input each block computes or reads; see `FewGroup.tiling`."""
        group = few_group(self.item)
        rows = group.rows
        epilogue = store_rows(
            [weight.out for weight in self.weights],
            [weight.bias for weight in self.weights],
            rows,
            lambda number, batch, token, row: (
                self._line(token, batch) * i64(rows[number]) + T.cast(row, "int64")
            ),
        )
        matrices = [weight.matrix for weight in self.weights]
        return FewProduct(group, matrices, self.tokens, self._prologue(), epilogue, group.tiling(warps))

    @property
    def _in_memory(self) -> bool:
        """Whether the input is read from memory where there are several tokens."""
        return self.item.region is None or self.item.keeps

    def _prologue(self) -> Prologue:
        if not self._in_memory:
            return self._computed
        x = self.rows[self.item.source]
        return read_rows(x, lambda token, batch: self._line(token, batch) * i64(self.columns))

    def _computed(self, block: Block) -> Reader:
        """The prologue that computes every activation where it is read."""
        region = self.item.region
        assert region is not None
        block.wait()

        def read_at(token: Expr, column: Expr, count: int) -> list[Expr]:
            row = RowBlock(region, self.rows, self.tokens, Place(token), block.thread, block.threads)
            start = column if self.batch == 1 else T.bind(block.batch * i32(self.columns) + column)
            return [T.bind(self._activation(row, start + i32(number), token)) for number in range(count)]

        return read_at

    def _activation(self, row: RowBlock, place: Expr, token: Expr) -> Expr:
        tensor = row.region.tensors[self.item.source]
        return row.element(self.item.source, split_place(tensor, place, token))

    def _many(self) -> None:
        if self.dtype == "float32":
            for weight in self.weights:
                x = self.rows[self.item.source]
                emit_plain(weight.shape, self.tokens, x, weight.matrix, weight.bias, weight.out)
            return
        if not self.item.given:
            self._round()
        self._multiply()

    def _round(self) -> None:
        if not self._in_memory:
            self._round_computed()
            return
        x = self.rows[self.item.source]
        rows = i64(self.batch) * self.tokens
        emit_round(
            x, self.rounded, rows, self.columns, self.rounding, self.item.terms, panels=self._in_panels
        )

    @property
    def _in_panels(self) -> bool:
        """Whether the rounded input lies as products of four warps take it, so that a tile's is copied at once."""
        plain = self.batch == 1 and not self.item.given and format_of(self.dtype) is None
        return self.hopper and plain and self.columns % PANEL == 0

    def _multiply(self) -> None:
        """The products of the rounded input."""
        width = self.item.rounded_columns
        rows = self.tokens if self._in_panels else None
        rounded = Operand(self.rounded, width, self.tokens * i64(width), panel_rows=rows)
        joint = self._emit_joint(rounded)
        for terms in (1, 2):
            parts = [
                self._part(weight, terms)
                for place, weight in enumerate(self.weights)
                if weight.shape.terms == terms and place not in joint
            ]
            if parts:
                emit_product(rounded, parts, hopper=self.hopper)

    def _emit_joint(self, rounded: Operand) -> tuple[int, ...]:
        """Products whose activation is stored instead of their results; which ones these are."""
        activation = self.item.activation
        if activation is None:
            return ()
        joint = [self.weights[place] for place in activation.places]
        parts = [self._part(weight, weight.shape.terms) for weight in joint]
        biases = [weight.bias for weight in joint]
        emit_activated(rounded, parts, biases, self.activated, activation, hopper=self.hopper)
        return activation.places

    def _part(self, weight: Weight, terms: int) -> Part:
        rows = weight.shape.rows
        packed = self.dtype if format_of(self.dtype) else None
        sizes = Sizes(self.tokens, rows, self.columns, self.rounding.dtype, self.batch, terms, packed)
        return Part(
            sizes,
            Operand(weight.matrix, sizes.row, rows * sizes.row),
            store_float32(Operand(weight.out, rows, self.tokens * i64(rows)), weight.bias, rows),
        )

    def _round_computed(self) -> None:
        """A launch with a block a token: its activations, computed and rounded."""
        region = self.item.region
        assert region is not None
        count = math.prod(region.tensors[self.item.source].row)
        with gpu.launch((self.tokens,), ROUND_THREADS) as ((token,), thread):
            gpu.launch_next()
            gpu.wait_previous()
            place = Place(token)
            row = RowBlock(region, self.rows, self.tokens, place, thread, ROUND_THREADS, at_once=AT_ONCE)

            def value(place: Expr) -> Expr:
                return self.rounding.scaled(self._activation(row, place, token))

            def keep(place: Expr, left: Expr) -> None:
                batch, column = T.truncdiv(place, i32(self.columns)), T.truncmod(place, i32(self.columns))
                target = self._line(token, batch) * i64(self.item.rounded_columns) + i64(column)
                for term in range(self.item.terms):
                    element = target + i64(term * padded(self.columns))
                    if self._in_panels:
                        element = panel_element(
                            i64(token),
                            column + i32(term * self.columns),
                            self.tokens,
                            token % i32(PANEL_PIECES),
                        )
                    write(self.rounded, self.rounding.dtype, element, left)
                    word = gpu.pack(self.rounding.dtype, left, T.float32(0))
                    left = T.bind(left - gpu.unpack(self.rounding.dtype, word)[0])

            row.each(count, value, keep)
