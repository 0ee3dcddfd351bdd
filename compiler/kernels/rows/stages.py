"""TVM's loops for one operator as *stages*: what each element of a tensor is, as an expression over other tensors.

A segment never mixes tokens (partition sees to that), so every tensor with a token axis is a row for each token, and an
element of a row depends on the same token's rows alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import tvm
from tvm import tirx
from tvm.ir.prim import expr as prim

Expr: TypeAlias = Any
Key: TypeAlias = Any
"""What tells tensors apart: a Relax variable, an `Item` of what an operator returns, or a buffer inside an operator."""


INSIDE = 1000
"""Numbers of items from here on are no results, but what an operator keeps inside."""


@dataclass(frozen=True)
class Item:
    """One of an operator's results."""

    variable: Any
    number: int


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor of a segment; ``token_axis`` is ``None`` where it has none (weights, tables)."""

    shape: tuple[int | None, ...]
    """``None`` at the token axis."""
    dtype: str

    @property
    def token_axis(self) -> int | None:
        """The axis that counts tokens."""
        return self.shape.index(None) if None in self.shape else None

    @property
    def row(self) -> tuple[int, ...]:
        """The shape of one token's row."""
        return tuple(extent for extent in self.shape if extent is not None)


@dataclass(frozen=True, eq=False)
class Stage:
    """One tensor, element by element."""

    key: Key
    tensor: Tensor
    axes: tuple[Expr, ...]
    """Variables of its axes, token axis included."""
    value: Expr
    """Of the element at ``axes``; loads are of buffers in ``sources``. Of a reduction: what is combined."""
    sources: dict[Any, Key]
    """Keys by buffer."""
    reduction: Reduction | None = None


@dataclass(frozen=True, eq=False)
class Reduction:
    """How a stage's values are combined over more axes."""

    kind: Literal["sum", "max", "min"]
    axes: tuple[tuple[Expr, int], ...]


@dataclass(frozen=True, eq=False)
class View:
    """The same elements in the same order in another shape."""

    key: Key
    tensor: Tensor
    source: Key
    source_tensor: Tensor


@dataclass(frozen=True, eq=False)
class TopK:
    """The largest elements along the last axis of each row, in falling order, ties by rising index."""

    key: Key
    """Of the values."""
    tensor: Tensor
    """Of the values."""
    source: Key
    source_tensor: Tensor
    count: int
    keys: tuple[Key, Key]
    """Of values and indices."""


class NotRowwise(Exception):  # noqa: N818 - no error: the operator is left to TVM's own schedules
    """Loops that are no stages."""


def tensor_of(shape: Any, dtype: Any) -> Tensor:
    """From a Relax or TIR shape; raises `NotRowwise` where an extent is neither a number nor T itself."""
    extents: list[int | None] = []
    for extent in shape:
        if isinstance(extent, (int, tirx.IntImm)):
            extents.append(int(extent))
        elif isinstance(extent, tirx.Var):
            extents.append(None)
        else:
            raise NotRowwise(f"extent {extent}")
    if extents.count(None) > 1:
        raise NotRowwise("two token axes")
    return Tensor(tuple(extents), str(dtype))


def parse(function: tirx.PrimFunc, arguments: list[Key], variable: Any) -> list[Stage]:
    """The stages of one call of a legalised operator.

    Args:
        function: its loops.
        arguments: the keys of its parameters, in order.
        variable: of the call's result; what the operator keeps inside becomes items of it.
    """
    sources: dict[Any, Key] = dict(zip(function.params, arguments, strict=True))
    stages: list[Stage] = []

    def visit(statement: Any) -> None:
        if isinstance(statement, tvm.s_tir.SBlockRealize):
            block = statement.block
            if block.iter_vars or isinstance(block.body, tirx.BufferStore):
                stages.append(_stage(block, sources))
                return
            for buffer in block.alloc_buffers:
                sources[buffer] = Item(variable, INSIDE + len(sources))
            visit(block.body)
        elif isinstance(statement, tirx.SeqStmt):
            for item in statement.seq:
                visit(item)
        elif isinstance(statement, tirx.For):
            visit(statement.body)
        else:
            raise NotRowwise(type(statement).__name__)

    visit(function.body)
    return stages


def _stage(block: Any, sources: dict[Any, Key]) -> Stage:
    store = block.body
    if not isinstance(store, tirx.BufferStore) or len(block.match_buffers):
        raise NotRowwise("no plain store")
    spatial = [item.var for item in block.iter_vars if int(item.iter_type) == tirx.IterVar.DataPar]
    reduced = [item for item in block.iter_vars if int(item.iter_type) == tirx.IterVar.CommReduce]
    if len(spatial) + len(reduced) != len(block.iter_vars):
        raise NotRowwise("an axis that is neither spatial nor reduced")
    tensor = tensor_of(store.buffer.shape, store.buffer.dtype)
    places = {var: axis for axis, var in enumerate(store.indices) if isinstance(var, tirx.Var)}
    axes: list[Any] = []
    for axis, index in enumerate(store.indices):
        if isinstance(index, tirx.Var):
            axes.append(index)
        elif isinstance(index, tirx.IntImm) and tensor.shape[axis] == 1:
            axes.append(tirx.Var("unit", "int64"))
        else:
            raise NotRowwise("a store at a computed place")
    hidden = [item for item in block.iter_vars if item.var in spatial and item.var not in places]
    if any(not isinstance(item.dom.extent, tirx.IntImm) or int(item.dom.extent) != 1 for item in hidden):
        raise NotRowwise("a loop that the result does not show")
    value, reduction = store.value, None
    if reduced:
        value, kind = _combined(store, block.init)
        reduction = Reduction(kind, tuple((item.var, _extent(item)) for item in reduced))
    return Stage(sources[store.buffer], tensor, tuple(axes), value, sources, reduction)


def _extent(item: Any) -> int:
    if not isinstance(item.dom.extent, tirx.IntImm):
        raise NotRowwise("a reduction over tokens")
    return int(item.dom.extent)


def _combined(store: Any, init: Any) -> tuple[Expr, Literal["sum", "max", "min"]]:
    kinds: dict[type, Literal["sum", "max", "min"]] = {prim.Add: "sum", prim.Max: "max", prim.Min: "min"}
    kind = kinds.get(type(store.value))
    if kind is None or init is None:
        raise NotRowwise("an unknown reduction")
    own = store.value.a
    if not isinstance(own, tvm.ir.expr.TensorLoad) or not own.source.same_as(store.buffer):
        raise NotRowwise("an unknown reduction")
    return store.value.b, kind
