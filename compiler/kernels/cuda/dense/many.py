"""The products of a dense kernel where tokens are many: the input is rounded once, then there is a launch a weight."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda import primitives as gpu
from moec.compiler.kernels.cuda.dense.activated import emit_activated, lies_in_panels
from moec.compiler.kernels.cuda.dense.plain import emit_plain
from moec.compiler.kernels.cuda.many.gemm import Operand, Part, store_float32
from moec.compiler.kernels.cuda.many.gemm import Product as Sizes
from moec.compiler.kernels.cuda.many.gemm_tiles import emit_product
from moec.compiler.kernels.cuda.many.rounding import Rounding, emit_round, term_in_panels
from moec.compiler.kernels.cuda.primitives import i32
from moec.compiler.kernels.cuda.rows.block import AT_ONCE, Place, RowBlock
from moec.compiler.kernels.cuda.threads import write
from moec.compiler.kernels.emit import ALIGNMENT_BYTES, STORAGE, i64
from moec.compiler.kernels.linear_shape import padded, rounded_type
from moec.formats import format_of

if TYPE_CHECKING:
    from moec.compiler.kernels.cuda.dense.input import ProductInput
    from moec.compiler.kernels.cuda.dense.parameters import Operands, Weight
    from moec.compiler.kernels.emit import Buffer, Expr
    from moec.compiler.kernels.rows.product import Activation

ROUND_THREADS = 256


class ManyProduct:
    """The products while they are emitted.

    Args:
        made: the input of all of them.
        given: the kernel's buffers.
        hopper: whether for Hopper GPUs alone.
    """

    def __init__(self, made: ProductInput, given: Operands, *, hopper: bool) -> None:
        self.input, self.item, self.tokens, self.hopper = made, made.item, made.tokens, hopper
        first = self.item.shapes[0]
        self.columns, self.dtype, self.batch = first.columns, first.dtype, first.batch or 1
        self.rounding = Rounding.of(first.dtype, first.dtype)
        self.weights, self.rounded, self.activated = given.weights, given.rounded, given.activated
        if self.item.held is not None:
            self.rounded = self._over(made.rows[self.item.held], self.item.rounded_columns, first.dtype)

    @property
    def rounds_itself(self) -> bool:
        """Whether there is something to be rounded, which whoever makes the input can do: see `put`."""
        return self.item.has_rounded and not self.item.given

    def emit(self, *, rounded: bool = False) -> None:
        """The launches; ``rounded``: the input has been put already."""
        if self.dtype == "float32":
            for weight in self.weights:
                x = self.input.memory
                emit_plain(weight.shape, self.tokens, x, weight.matrix, weight.bias, weight.out)
            return
        if self.rounds_itself and not rounded:
            self._round()
        self._multiply()

    def put(self, token: Expr, place: Expr, value: Expr) -> None:
        """Emit what rounds one element of a token's input, at a place of its row (int32), and stores it."""
        left = T.bind(self.rounding.scaled(value))
        batch, column = T.truncdiv(place, i32(self.columns)), T.truncmod(place, i32(self.columns))
        target = self.input.line(token, batch) * i64(self.item.rounded_columns) + i64(column)
        for term in range(self.item.terms):
            element = target + i64(term * padded(self.columns))
            if self._in_panels:
                element = term_in_panels(i64(token), column, term, self.columns, self.tokens)
            write(self.rounded, self.rounding.dtype, element, left)
            word = gpu.pack(self.rounding.dtype, left, T.float32(0))
            left = T.bind(left - gpu.unpack(self.rounding.dtype, word)[0])

    def _round(self) -> None:
        if not self.input.in_memory:
            self._round_computed()
            return
        x = self.input.memory
        rows = i64(self.batch) * self.tokens
        emit_round(
            x, self.rounded, rows, self.columns, self.rounding, self.item.terms, panels=self._in_panels
        )

    @property
    def _in_panels(self) -> bool:
        return lies_in_panels(self.item.shapes[0], hopper=self.hopper)

    def _activated(self, activation: Activation) -> Buffer:
        """Where the reader's input is written."""
        if not activation.beyond:
            return self.activated
        out = self.weights[activation.places[0]].out
        return self._over(out, activation.rounded_columns, activation.reader.dtype)

    def _over(self, buffer: Buffer, columns: int, dtype: str) -> Buffer:
        """The memory of float32 numbers as ``[T, columns]`` rounded for weights of a type."""
        kind = STORAGE[rounded_type(dtype)]
        return T.decl_buffer((self.tokens * i64(columns),), kind, data=buffer.data, align=ALIGNMENT_BYTES)

    def _multiply(self) -> None:
        """The products of the rounded input: those of both terms while the second-level cache still has it."""
        width = self.item.rounded_columns
        rows = self.tokens if self._in_panels else None
        rounded = Operand(self.rounded, width, self.tokens * i64(width), panel_rows=rows)
        joint = () if self.item.activation is None else self.item.activation.places
        for terms in (2, 1):
            parts = [
                self._part(weight, terms)
                for place, weight in enumerate(self.weights)
                if weight.shape.terms == terms and place not in joint
            ]
            if parts:
                emit_product(rounded, parts, hopper=self.hopper)
        if self.item.activation is not None:
            self._emit_joint(rounded, self.item.activation)

    def _emit_joint(self, rounded: Operand, activation: Activation) -> None:
        """Products whose activation is stored instead of their results."""
        joint = [self.weights[place] for place in activation.places]
        parts = [self._part(weight, weight.shape.terms) for weight in joint]
        biases = [weight.bias for weight in joint]
        emit_activated(rounded, parts, biases, self._activated(activation), activation, hopper=self.hopper)

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
            row = RowBlock(
                region, self.input.rows, self.tokens, place, thread, ROUND_THREADS, at_once=AT_ONCE
            )

            row.each(
                count,
                lambda place: self.input.element(row, place, token),
                lambda place, value: self.put(token, place, value),
            )
