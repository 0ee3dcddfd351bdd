"""The parameters of a kernel of products, in order: what it reads, weights, what it keeps, results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.primitives import i32
from moec.compiler.kernels.emit import Argument, Buffer, Expr, arguments, build, symbol
from moec.compiler.kernels.linear_shape import rounded_type

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tvm import tirx

    from moec.compiler.kernels.linear_shape import LinearShape
    from moec.compiler.kernels.rows.product import Product


def declare(shape: LinearShape) -> tirx.PrimFunc:
    """A kernel that does nothing, which stands for a product until it is known what it is fused with."""
    lead = () if shape.batch is None else (shape.batch,)

    def body() -> None:
        tokens = symbol("T")
        arguments(
            Argument("x", (*lead, tokens, shape.columns), "float32"),
            Argument("weight", *shape.weight),
            Argument("bias", (*lead, shape.rows), "float32") if shape.bias else None,
            Argument("out", (*lead, tokens, shape.rows), "float32"),
        )
        T.evaluate(i32(0))

    return build("linear", body)


def parameters(item: Product, tokens: Expr) -> list[Argument | None]:
    """The kernel's parameters in order; ``None`` stands for one that it does not have."""
    first = item.shapes[0]
    lead = () if first.batch is None else (first.batch,)

    def row(name: str, key: object) -> Argument:
        if item.region is None:
            return Argument("x", (*lead, tokens, first.columns), "float32")
        tensor = item.region.tensors[key]
        shape = tuple(tokens if extent is None else extent for extent in tensor.shape)
        return Argument(name, shape, tensor.dtype)

    groups = [item] if item.beside is None else [item, item.beside]
    declared: list[Argument | None] = [row(f"a{number}", key) for number, key in enumerate(item.reads)]
    for shape in (shape for each in groups for shape in each.shapes):
        declared.append(Argument("weight", *shape.weight))
        declared.append(Argument("bias", (*lead, shape.rows), "float32") if shape.bias else None)
    for each in groups:
        kind = rounded_type(each.shapes[0].dtype)
        rounded = Argument("rounded", (*lead, tokens, each.rounded_columns), kind)
        declared.append(rounded if each.has_rounded else None)
    if item.activation is not None and item.has_activated:
        columns, dtype = item.activation.rounded_columns, rounded_type(item.activation.reader.dtype)
        declared.append(Argument("activated", (tokens, columns), dtype))
    declared += [row(f"kept{number}", key) for number, key in enumerate(item.kept)]
    for shape in (shape for each in reversed(groups) for shape in each.shapes):
        declared.append(Argument("out", (*lead, tokens, shape.rows), "float32"))
    return declared


@dataclass(frozen=True)
class Weight:
    """One of the weights, and where its results go."""

    shape: LinearShape
    matrix: Buffer
    bias: Buffer | None
    out: Buffer


@dataclass(frozen=True)
class Operands:
    """The kernel's buffers by what they are for."""

    rows: dict[Any, Buffer]
    """What is read and kept, by key."""
    weights: list[Weight]
    rounded: Any
    """``None`` where weights are float32, or the input is held."""
    activated: Any
    """``None`` where there is no activation, or its reader is another segment's."""
    beside: list[Any]
    """The buffers of the product beside it, in its own order."""


def operands_of(item: Product, buffers: Sequence[Any]) -> Operands:
    """``buffers``, one for each of `parameters`."""
    count, others = len(item.shapes), 0 if item.beside is None else len(item.beside.shapes)
    read, rest = _cut(buffers, len(item.reads))
    weights, rest = _cut(rest, 2 * (count + others))
    rounded, rest = _cut(rest, 1 if item.beside is None else 2)
    activated, rest = _cut(rest, 1 if item.has_activated else 0)
    held, outs = _cut(rest, len(item.kept))
    rows = dict(zip((*item.reads, *item.kept), (*read, *held), strict=True))
    own = [
        Weight(shape, weights[2 * number], weights[2 * number + 1], out)
        for number, (shape, out) in enumerate(zip(item.shapes, outs[others:], strict=True))
    ]
    beside = [rows[item.source], *weights[2 * count :], *rounded[1:], *outs[:others]] if others else []
    return Operands(rows, own, rounded[0], activated[0] if activated else None, beside)


def _cut(items: Sequence[Any], count: int) -> tuple[Sequence[Any], Sequence[Any]]:
    """The first so many, and the others."""
    return items[:count], items[count:]
