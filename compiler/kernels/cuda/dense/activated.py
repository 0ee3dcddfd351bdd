"""Products of many tokens that store what their only reader multiplies: an activation of them, rounded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda import primitives as gpu
from moec.compiler.kernels.cuda.many.gemm_joint import emit_joint
from moec.compiler.kernels.cuda.many.gemm_tiles import with_tile
from moec.compiler.kernels.cuda.many.panels import PANEL
from moec.compiler.kernels.cuda.many.rounding import Rounding, term_in_panels
from moec.compiler.kernels.cuda.primitives import i32
from moec.compiler.kernels.cuda.rows.block import Place, RowBlock
from moec.compiler.kernels.cuda.rows.values import split_place
from moec.compiler.kernels.emit import i64, load
from moec.formats import format_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.compiler.kernels.cuda.many.gemm import Operand, Part
    from moec.compiler.kernels.emit import Buffer, Expr
    from moec.compiler.kernels.linear_shape import LinearShape
    from moec.compiler.kernels.rows.product import Activation
    from moec.compiler.kernels.rows.stages import Key, Tensor


def lies_in_panels(shape: LinearShape, *, hopper: bool) -> bool:
    """Whether a product's rounded input lies as products of four warps take it, so that a tile's is copied at once."""
    plain = shape.batch is None and format_of(shape.dtype) is None
    return hopper and plain and shape.columns % PANEL == 0


class _Sums(RowBlock):
    """A row whose inputs are values of one place, in registers."""

    def __init__(self, activation: Activation, tokens: Expr, token: Expr, values: dict[Key, Expr]) -> None:
        super().__init__(activation.region, {}, tokens, Place(token), i32(0), 1)
        self._values = values

    def _read(self, key: Key, tensor: Tensor, indices: Sequence[Expr]) -> Expr:
        del tensor, indices  # of the same place
        return self._values[key]


def emit_activated(
    a: Operand,
    parts: Sequence[Part],
    biases: Sequence[Buffer | None],
    out: Buffer,
    activation: Activation,
    *,
    hopper: bool,
) -> None:
    """Emit the launch.

    Args:
        a: as for `gemm.emit_parts`.
        parts: the products; their epilogues are not used.
        biases: float32 ``[N]`` of each product, where it has one.
        out: 16-bit ``[T, activation.rounded_columns]``, in panels where the reader's input lies so.
        activation: of the products' results.
        hopper: whether for Hopper GPUs.
    """
    reader, tokens = activation.reader, parts[0].product.tokens
    rounding = Rounding.of(reader.dtype, reader.dtype)
    tensor = activation.region.tensors[activation.source]
    panels = lies_in_panels(reader, hopper=hopper)

    def activated(row: Expr, column: Expr, sums: list[Expr]) -> Expr:
        whole = [
            T.bind(value if bias is None else value + load(bias, i64(column)))
            for value, bias in zip(sums, biases, strict=True)
        ]
        block = _Sums(activation, tokens, row, dict(zip(activation.results, whole, strict=True)))
        return T.bind(rounding.scaled(block.element(activation.source, split_place(tensor, column, row))))

    def store(row: Expr, column: Expr, sums: list[list[Expr]]) -> None:
        values = [
            activated(row, T.bind(column + i32(number)), [pair[number] for pair in sums])
            for number in range(2)
        ]
        start = i64(row) * i64(activation.rounded_columns) + i64(column)
        for term in range(reader.terms):
            word = gpu.pack(rounding.dtype, *values)
            if panels:
                place = term_in_panels(i64(row), column, term, reader.columns, tokens)
            else:
                place = T.bind(start + i64(term * reader.columns))
            gpu.call("store_4", gpu.element(out, place), word)
            seen = gpu.unpack(rounding.dtype, word)
            values = [T.bind(value - own) for value, own in zip(values, seen, strict=True)]

    with_tile(parts, lambda tile: emit_joint(a, parts, tile, store), hopper=hopper)
