"""Products of many tokens that store what their only reader multiplies: an activation of them, rounded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda import primitives as gpu
from moec.compiler.kernels.cuda.gemm_joint import emit_joint
from moec.compiler.kernels.cuda.gemm_tiles import with_tile
from moec.compiler.kernels.cuda.primitives import i32
from moec.compiler.kernels.cuda.rounding import Rounding
from moec.compiler.kernels.cuda.row_block import Place, RowBlock
from moec.compiler.kernels.cuda.row_values import split_place
from moec.compiler.kernels.emit import i64, load

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.compiler.kernels.cuda.gemm import Operand, Part
    from moec.compiler.kernels.emit import Buffer, Expr
    from moec.compiler.kernels.rows.product import Activation
    from moec.compiler.kernels.rows.stages import Key, Tensor


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
        out: 16-bit ``[T, columns]``.
        activation: of the products' results.
        hopper: whether for Hopper GPUs.
    """
    rounding = Rounding.of(activation.dtype, activation.dtype)
    tensor, tokens = activation.region.tensors[activation.source], parts[0].product.tokens

    def store(row: Expr, column: Expr, sums: list[list[Expr]]) -> None:
        values = []
        for number in range(2):
            own = T.bind(column + i32(number))
            whole = [
                T.bind(pair[number] if bias is None else pair[number] + load(bias, i64(own)))
                for pair, bias in zip(sums, biases, strict=True)
            ]
            block = _Sums(activation, tokens, row, dict(zip(activation.results, whole, strict=True)))
            place = split_place(tensor, own, row)
            values.append(T.bind(rounding.scaled(T.bind(block.element(activation.source, place)))))
        start = T.bind(i64(row) * i64(activation.columns) + i64(column))
        gpu.call("store_4", gpu.element(out, start), gpu.pack(rounding.dtype, *values))

    with_tile(parts, lambda tile: emit_joint(a, parts, tile, store), hopper=hopper)
