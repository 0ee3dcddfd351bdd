"""The input of a dense product: where it lies in memory, or what of a region it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.rows.values import split_place

if TYPE_CHECKING:
    from moec.compiler.kernels.cuda.rows.block import RowBlock
    from moec.compiler.kernels.emit import Buffer, Expr
    from moec.compiler.kernels.rows.product import Product


@dataclass(frozen=True)
class ProductInput:
    """What a kernel multiplies its weights with, for T tokens."""

    item: Product
    tokens: Expr
    """T, int64."""
    rows: dict[Any, Buffer]
    """The tensors of the region that makes it, or it alone."""

    @property
    def in_memory(self) -> bool:
        """Whether it is read from memory where there are several tokens."""
        return self.item.region is None or self.item.keeps

    @property
    def memory(self) -> Buffer:
        """Float32 ``[.., T, K]``, where it is."""
        return self.rows[self.item.source]

    def line(self, token: Expr, batch: Expr) -> Expr:
        """Row of an input or a result: matrices of a batch one after the other."""
        return T.cast(batch, "int64") * self.tokens + T.cast(token, "int64")

    def element(self, row: RowBlock, place: Expr, token: Expr) -> Expr:
        """One of a token's activations, computed."""
        tensor = row.region.tensors[self.item.source]
        return row.element(self.item.source, split_place(tensor, place, token))
